/* Stands between the program and the C library, for tests. With LOKR_SHIM_CLOCK the wall clock jumps by years, forth and back, at every
 * look at it. With LOKR_SHIM_LOG=FILE what decides over survival after a power loss is recorded: write, sync, mkdir, rename, one line
 * each, fields parted by tabs, paths absolute. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static long jump(void) {
    /* To before 1970, and to after 2100. */
    static const long years[] = {0, 90, -20, 40, -70};
    static unsigned looks;
    if (!getenv("LOKR_SHIM_CLOCK")) return 0;
    return years[__atomic_fetch_add(&looks, 1, __ATOMIC_RELAXED) % 5] * 31556952L;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int result = (int)syscall(SYS_clock_gettime, clock, now);
    if (result == 0 && clock == CLOCK_REALTIME) now->tv_sec += jump();
    return result;
}

static void record(const char *format, ...) {
    const char *log = getenv("LOKR_SHIM_LOG");
    if (!log) return;
    char line[3 * PATH_MAX];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    int file = (int)syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0644);
    if (file < 0) return;
    syscall(SYS_write, file, line, length);
    syscall(SYS_close, file);
}

static const char *path_of(int file, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    path[length < 0 ? 0 : length] = 0;
    return path;
}

static const char *absolute(const char *path, char *full) {
    char here[PATH_MAX];
    if (path[0] == '/' || !getcwd(here, sizeof here)) snprintf(full, 2 * PATH_MAX, "%s", path);
    else snprintf(full, 2 * PATH_MAX, "%s/%s", here, path);
    return full;
}

ssize_t write(int file, const void *bytes, size_t count) {
    char path[PATH_MAX];
    if (getenv("LOKR_SHIM_LOG") && path_of(file, path)[0] == '/') record("write\t%s\n", path);
    return syscall(SYS_write, file, bytes, count);
}

int fsync(int file) {
    char path[PATH_MAX];
    int result = (int)syscall(SYS_fsync, file);
    if (result == 0) record("sync\t%s\n", path_of(file, path));
    return result;
}

int mkdir(const char *path, mode_t mode) {
    char full[2 * PATH_MAX];
    int result = REAL(mkdir)(path, mode);
    if (result == 0) record("mkdir\t%s\n", absolute(path, full));
    return result;
}

int rename(const char *from, const char *to) {
    char a[2 * PATH_MAX], b[2 * PATH_MAX];
    int result = REAL(rename)(from, to);
    if (result == 0) record("rename\t%s\t%s\n", absolute(from, a), absolute(to, b));
    return result;
}
