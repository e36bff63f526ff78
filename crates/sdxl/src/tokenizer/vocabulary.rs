//! The byte-pair vocabulary of CLIP, read from the file that open_clip ships (see `assets/`). Byte values stand in it as
//! printable characters; the order of the merges is the order of the ids. Encoding is `mod.rs`; the tokenizer files of a
//! diffusers folder are written from here by `checkpoint`.

use std::io::{BufRead, BufReader};

use flate2::read::GzDecoder;

use crate::error::{Error, Result};

const FILE: &[u8] = include_bytes!("../../assets/bpe_simple_vocab_16e6.txt.gz");
/// Ids in all: 256 bytes, the same 256 as word ends, the merges, BOS and EOS.
const SIZE: usize = 49408;
const MERGES: usize = SIZE - 2 - 2 * 256;

/// Marks a token that ends a word.
pub(crate) const WORD_END: &str = "</w>";
/// Begins every row; id 49406.
pub(crate) const BOS_TEXT: &str = "<|startoftext|>";
/// Ends every row; id 49407.
pub(crate) const EOS_TEXT: &str = "<|endoftext|>";

/// All tokens and merges.
pub(crate) struct Vocabulary {
    /// Token texts; the index is the id.
    pub tokens: Vec<String>,
    /// The pairs to be joined, most frequent first.
    pub merges: Vec<(String, String)>,
}

impl Vocabulary {
    /// Unpacks the built-in file. The file goes on past CLIP's 49408 ids; what follows is not read.
    pub fn read() -> Result<Vocabulary> {
        let broken = |what: String| Error::Vocabulary { what };
        let mut merges = Vec::with_capacity(MERGES);
        for line in BufReader::new(GzDecoder::new(FILE)).lines().skip(1).take(MERGES) {
            let line = line.map_err(|e| broken(e.to_string()))?;
            let (a, b) = line.split_once(' ').ok_or_else(|| broken(format!("merge `{line}` is no pair")))?;
            merges.push((a.to_owned(), b.to_owned()));
        }
        if merges.len() != MERGES {
            return Err(broken(format!("{} merges; CLIP has {MERGES}", merges.len())));
        }
        let bytes = bytes_in_id_order();
        let mut tokens: Vec<String> = Vec::with_capacity(SIZE);
        tokens.extend(bytes.iter().map(|(_, c)| c.to_string()));
        tokens.extend(bytes.iter().map(|(_, c)| format!("{c}{WORD_END}")));
        tokens.extend(merges.iter().map(|(a, b)| format!("{a}{b}")));
        tokens.extend([BOS_TEXT.to_owned(), EOS_TEXT.to_owned()]);
        Ok(Vocabulary { tokens, merges })
    }
}

/// Each byte with the character that stands for it, in the order of the ids: the printable ones of Latin-1 stand for
/// themselves and come first, the others take the characters from U+0100 on
/// (openai/CLIP, clip/simple_tokenizer.py, `bytes_to_unicode`).
fn bytes_in_id_order() -> Vec<(u8, char)> {
    let printable = |b: &u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let own = (0..=255u8).filter(printable).map(|b| (b, char::from(b)));
    let others = (0..=255u8).filter(|b| !printable(b)).zip('\u{100}'..);
    own.chain(others).collect()
}

/// The character that stands for each byte.
pub(crate) fn byte_characters() -> [char; 256] {
    let mut table = ['\0'; 256];
    for (byte, c) in bytes_in_id_order() {
        table[usize::from(byte)] = c;
    }
    table
}
