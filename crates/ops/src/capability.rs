//! Which of the CPU's instructions are used for f32. Results depend on them in the last bits, so a run can be told to use fewer than there
//! are: to go on with the same bits on a machine that has no more.

use std::sync::LazyLock;

/// Says which: `default` (those of every x86-64 or other CPU), `avx2` or `avx512`, as `ATEN_CPU_CAPABILITY` does for PyTorch. The best that
/// the CPU has if it is not set.
pub const CPU_CAPABILITY: &str = "LOKR_CPU_CAPABILITY";

/// Instructions, fewest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Capability {
    Default,
    /// With FMA.
    Avx2,
    Avx512,
}

const NAMES: [(&str, Capability); 3] = [("default", Capability::Default), ("avx2", Capability::Avx2), ("avx512", Capability::Avx512)];

/// The best that this CPU has.
fn best() -> Capability {
    #[cfg(target_arch = "x86_64")]
    match pulp::Arch::new() {
        pulp::Arch::V4(_) => return Capability::Avx512,
        pulp::Arch::V3(_) => return Capability::Avx2,
        _ => {}
    }
    Capability::Default
}

/// What is asked for, or why that cannot be.
fn asked(value: Option<&str>, best: Capability) -> Result<Capability, String> {
    let Some(value) = value else { return Ok(best) };
    let Some(&(_, asked)) = NAMES.iter().find(|(name, _)| *name == value) else {
        return Err(format!("{CPU_CAPABILITY}={value}: no such set of instructions; take default, avx2 or avx512"));
    };
    let has = NAMES.iter().find(|(_, c)| *c == best).map_or("default", |(name, _)| name);
    if asked > best { Err(format!("{CPU_CAPABILITY}={value}: this CPU has {has} at most")) } else { Ok(asked) }
}

fn from_environment() -> Result<Capability, String> {
    asked(std::env::var(CPU_CAPABILITY).ok().as_deref(), best())
}

/// Whether what [`CPU_CAPABILITY`] asks for can be had.
///
/// # Errors
/// If not, with the names that can.
pub fn check_cpu_capability() -> Result<(), String> {
    from_environment().map(|_| ())
}

/// What is used: what is asked for, or the best where that cannot be had.
pub(crate) fn capability() -> Capability {
    static USED: LazyLock<Capability> = LazyLock::new(|| from_environment().unwrap_or_else(|_| best()));
    *USED
}

/// The same as pulp dispatches to it.
pub(crate) fn arch() -> pulp::Arch {
    static ARCH: LazyLock<pulp::Arch> = LazyLock::new(|| match (capability(), pulp::Arch::new()) {
        #[cfg(target_arch = "x86_64")]
        (Capability::Avx2, _) => pulp::x86::V3::try_new().map_or(pulp::Arch::Scalar, pulp::Arch::V3),
        (Capability::Default, _) => pulp::Arch::Scalar,
        (_, best) => best,
    });
    *ARCH
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_is_used_than_is_asked_for_and_there() {
        use Capability::*;
        assert_eq!(asked(None, Avx2), Ok(Avx2));
        for (value, best, want) in [("default", Avx512, Default), ("avx2", Avx512, Avx2), ("avx512", Avx512, Avx512)] {
            assert_eq!(asked(Some(value), best), Ok(want));
        }
        let error = asked(Some("avx512"), Avx2).expect_err("there is none");
        assert_eq!(error, "LOKR_CPU_CAPABILITY=avx512: this CPU has avx2 at most");
        assert!(asked(Some("sse9"), Avx2).expect_err("unknown").contains("take default, avx2 or avx512"));
        assert!(capability() <= best());
    }
}
