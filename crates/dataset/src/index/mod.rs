//! One SQLite file that knows every image of a dataset: where it lies, how large it is, what is known of its post. It is
//! built once, in parallel, from headers and metadata ([`build`]), and read in seconds by every process of a run.
//!
//! Left to others: which images a run takes (`select`), what becomes of tags (`tags`), buckets, pixels.

mod build;
mod check;
mod danbooru;
mod files;
mod finish;
mod head;
mod kinds;
mod parquet;
mod position;
mod posts;
mod read;
mod relations;
mod scan;
mod schema;
mod sd_scripts;
mod sources;
mod tags;
mod tar;
mod writer;

pub use build::{BuildOptions, BuildReport, Ids, Phase, Progress, build};
pub use check::{IndexCheck, check};
pub use kinds::{FileFormat, Rating, State, TagClass};
pub use read::{Index, Place, PostInfo, Row, Summary};
pub use sources::Source;
pub use tags::TagTable;
pub use writer::Changes;

pub(crate) use tags::numbers;
