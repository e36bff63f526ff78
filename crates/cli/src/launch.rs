//! `lokr launch`: this program again, once for each device.

use std::ffi::OsString;
use std::io::IsTerminal;
use std::process::ExitCode;

use trainer::launch::{Death, LaunchOptions, print_line};
use trainer::{Error, Result};

use crate::args::Launch;

/// Status of a process that ended because of another one.
pub const PEER_FAILED: u8 = trainer::launch::PEER_FAILED as u8;

/// Starts the processes of this machine, passes on what they print, and says which one brought the others down.
pub fn launch(args: Launch) -> Result<ExitCode> {
    if args.command.first().is_none_or(|name| name != "train") {
        let given = args.command.first().map(|c| c.to_string_lossy().into_owned()).unwrap_or_default();
        return Err(Error::refused(
            format!("lokr launch cannot start `{given}`: only `train` runs on several processes"),
            "write `lokr launch --nproc-per-node 4 -- train --config recipe.toml`",
        ));
    }
    let program =
        std::env::current_exe().map_err(|e| Error::refused(format!("the program cannot find itself: {e}"), "start it by its full path"))?;
    let mut options = LaunchOptions::new(program, args.command);
    options.nproc_per_node = args.nproc_per_node;
    options.nnodes = args.nnodes;
    options.node_rank = args.node_rank;
    options.rdzv_endpoint = args.rdzv_endpoint;
    options.max_restarts = args.max_restarts;
    // Rank 0 draws its bar itself; it goes to standard error.
    options.terminal_rank = (args.node_rank == 0 && std::io::stderr().is_terminal()).then_some(0);
    let told = |death: &Death, number: u32| {
        report(death);
        eprintln!("starting again from the newest whole checkpoint (restart {number} of {})", args.max_restarts);
        vec![OsString::from("--resume"), OsString::from("latest")]
    };
    let outcome = trainer::launch::launch(&options, print_line, told)?;
    if let Some(death) = outcome.death.as_ref().filter(|_| outcome.interrupted.is_none()) {
        report(death);
    }
    Ok(ExitCode::from(u8::try_from(outcome.exit_code()).unwrap_or(1)))
}

fn report(death: &Death) {
    eprintln!("error: {death}");
    if !death.last_lines.is_empty() {
        eprintln!("its last lines:");
        death.last_lines.iter().for_each(|line| eprintln!("  {line}"));
    }
    if let Some(hint) = death.hint() {
        eprintln!("hint: {hint}");
    }
}
