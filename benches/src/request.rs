//! The side of a program that is measured piece by piece: it says what it can time, then times one thing for each line it
//! reads. So a comparison can put the pieces of several programs next to each other in time, and repeat those during which
//! the machine had other work (`benches/torch/compare.py`).

use std::io::{BufRead, Write};

use serde_json::{Value, json};

use crate::Result;

/// Prints `{"ready": [names]}`, then for each name that is read the JSON that `time` gives, until the input ends.
///
/// # Errors
/// What `time` returns, or that the pipe broke.
pub fn serve(names: &[&str], mut time: impl FnMut(&str) -> Result<Value>) -> Result<()> {
    say(&json!({ "ready": names }))?;
    for name in std::io::stdin().lock().lines() {
        say(&time(name?.trim())?)?;
    }
    Ok(())
}

fn say(line: &Value) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}")?;
    Ok(out.flush()?)
}
