/* Preloaded, it lets a program on one thread time itself in processor time, which other programs on the machine do not spoil much:
 *
 *   cc -shared -fPIC -O2 -o target/thread_clock.so benches/thread_clock.c
 *   LD_PRELOAD=target/thread_clock.so target/release/ops --threads 1 --only lion8bit
 */
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

int clock_gettime(clockid_t clock, struct timespec *time) {
    return syscall(SYS_clock_gettime, clock == CLOCK_MONOTONIC ? CLOCK_THREAD_CPUTIME_ID : clock, time);
}
