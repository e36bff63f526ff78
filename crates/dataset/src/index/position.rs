//! How far the import of a file of metadata has come, kept in the index itself, so that a build that was stopped goes on there.

use std::path::Path;

use storage::Stamp;

use super::build::{Phase, Reporter};
use super::writer::Writer;
use crate::Result;

/// Where an import stands: of which file, and how far.
pub(super) struct Position {
    key: String,
    stamp: Stamp,
    /// Two numbers that mean something to the reader of that kind of file.
    pub at: [i64; 2],
    pub done: bool,
}

impl Position {
    /// The start, or where an import of the same file was left.
    pub fn load(writer: &mut Writer, source: i64, file: &Path, start: [i64; 2]) -> Result<Self> {
        let (key, stamp) = (format!("position of source {source}"), storage::stamp(file)?);
        let fresh = Self { key: key.clone(), stamp, at: start, done: false };
        let Some(text) = writer.meta(&key)? else { return Ok(fresh) };
        let numbers: Vec<i64> = text.split(' ').filter_map(|n| n.parse().ok()).collect();
        Ok(match numbers[..] {
            [len, modified, a, b, done] if (len, modified) == (stamp.len as i64, stamp.modified) => {
                Self { at: [a, b], done: done == 1, ..fresh }
            }
            _ => fresh,
        })
    }

    /// Saves it together with what was written until now.
    pub fn commit(&self, writer: &mut Writer) -> Result<()> {
        let Stamp { len, modified } = self.stamp;
        let text = format!("{len} {modified} {} {} {}", self.at[0], self.at[1], i64::from(self.done));
        writer.set_meta(&self.key, &text)?;
        writer.commit()
    }

    /// At a safe point: saves when it is time, and before a stop.
    pub fn pass(&self, writer: &mut Writer, report: &mut Reporter, done: u64, total: u64) -> Result<()> {
        let told = report.tell(Phase::Posts, done, total);
        if told.is_err() || writer.is_due() {
            self.commit(writer)?;
        }
        told
    }
}
