//! The tokenizer of both text encoders (CLIP's byte pairs) and the cutting of long captions into rows of 77 ids, exactly
//! as sd-scripts does it (library/strategy_base.py, strategy_sdxl.py; design facts 2.6). It equals the Python
//! CLIPTokenizer with ftfy, not the fast tokenizer without.
//!
//! A caption becomes 1, 2 or 3 rows (`max_token_length` 75, 150, 225). Commas play no part in where it is cut. The
//! encoders run each row by itself. Emphasis (`(word:1.2)`) is `prompt.rs` and is only looked at where asked for.

mod clean;
mod prompt;
pub(crate) mod vocabulary;

use regex::Regex;
use tokenizers::Model;
use tokenizers::models::bpe::{BPE, Vocab};

use crate::error::{Error, Result};
pub use prompt::{WeightedRows, parse_emphasis};
use vocabulary::{BOS_TEXT, EOS_TEXT, Vocabulary, WORD_END};

/// First id of every row.
pub const BOS: u32 = 49406;
/// Last id of a caption; te1 also pads with it.
pub const EOS: u32 = 49407;
/// What te2 pads with: the id of "!" inside a word.
pub const TE2_PAD: u32 = 0;
/// Ids in a row.
pub const ROW: usize = 77;
/// Ids of a row that carry the caption: all but the first and the last.
pub const INNER: usize = ROW - 2;

/// One row of ids, as an encoder takes it.
pub type Row = [u32; ROW];

/// A text that stands for an id wherever it is in a caption, and is found before anything else is done to it.
type Special = (&'static str, u32);
const SPECIALS: &[Special] = &[(BOS_TEXT, BOS), (EOS_TEXT, EOS)];
/// diffusers declares te2's padding token special, so "!" never joins the marks beside it.
const SPECIALS_WITH_PAD: &[Special] = &[(BOS_TEXT, BOS), (EOS_TEXT, EOS), ("!", TE2_PAD)];

/// CLIP's tokenizer. Building it takes some tens of milliseconds; it can be shared between threads.
pub struct Tokenizer {
    bpe: BPE,
    words: Regex,
    byte_characters: [char; 256],
    te2_specials: &'static [Special],
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Tokenizer")
    }
}

impl Tokenizer {
    /// Builds the tokenizer from the built-in vocabulary.
    ///
    /// # Errors
    /// [`Error::Vocabulary`] if that is damaged, which only a broken build can bring about.
    pub fn new() -> Result<Tokenizer> {
        let Vocabulary { tokens, merges } = Vocabulary::read()?;
        let ids: Vocab = tokens.into_iter().zip(0..).collect();
        let bpe = BPE::builder().vocab_and_merges(ids, merges).end_of_word_suffix(WORD_END.to_owned());
        let bpe = bpe.build().map_err(|e| Error::Vocabulary { what: e.to_string() })?;
        // openai/CLIP, clip/simple_tokenizer.py: special tokens, English contractions, letters, single digits, marks.
        let words = r"(?i)<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+";
        let words = Regex::new(words).map_err(|e| Error::Vocabulary { what: e.to_string() })?;
        Ok(Tokenizer { bpe, words, byte_characters: vocabulary::byte_characters(), te2_specials: SPECIALS_WITH_PAD })
    }

    /// How te2 reads "!". Off: as a special token of its own, which is what diffusers' `tokenizer_2` does. On: as a mark
    /// like any other, as te1 does; this is what sd-scripts does, which sets the padding token by its id.
    pub fn plain_exclamation_marks(mut self, on: bool) -> Tokenizer {
        self.te2_specials = if on { SPECIALS } else { SPECIALS_WITH_PAD };
        self
    }

    /// All ids of a caption as te1 reads it, with BOS and EOS, however many.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        let mut ids = vec![BOS];
        self.push_tokens(text, SPECIALS, &mut ids);
        ids.push(EOS);
        ids
    }

    /// The ids of a caption as te1 reads it, without BOS and EOS.
    pub fn tokens(&self, text: &str) -> Vec<u32> {
        let mut ids = Vec::new();
        self.push_tokens(text, SPECIALS, &mut ids);
        ids
    }

    /// `chunks` rows (at least one) for te1; the caption is cut off after 75 * `chunks` tokens.
    pub fn te1_rows(&self, text: &str, chunks: usize) -> Vec<Row> {
        rows(&self.tokens(text), chunks, EOS)
    }

    /// `chunks` rows (at least one) for te2; the caption is cut off after 75 * `chunks` tokens.
    pub fn te2_rows(&self, text: &str, chunks: usize) -> Vec<Row> {
        let mut ids = Vec::new();
        self.push_tokens(text, self.te2_specials, &mut ids);
        rows(&ids, chunks, TE2_PAD)
    }

    fn push_tokens(&self, text: &str, specials: &[Special], ids: &mut Vec<u32>) {
        // Special texts are found before cleaning, which then sees the pieces between them.
        let mut rest = text;
        while let Some((at, special, id)) = next_special(rest, specials) {
            self.push_piece(&rest[..at], ids);
            ids.push(id);
            rest = &rest[at + special.len()..];
        }
        self.push_piece(rest, ids);
    }

    fn push_piece(&self, text: &str, ids: &mut Vec<u32>) {
        let text = clean::clean(text);
        let mut mapped = String::new();
        for word in self.words.find_iter(&text) {
            let word = word.as_str();
            match word {
                BOS_TEXT => ids.push(BOS),
                EOS_TEXT => ids.push(EOS),
                _ => {
                    mapped.clear();
                    mapped.extend(word.bytes().map(|byte| self.byte_characters[usize::from(byte)]));
                    // The vocabulary holds every byte, inside a word and at its end, so no word can fail.
                    let tokens = self.bpe.tokenize(&mapped).unwrap_or_default();
                    ids.extend(tokens.iter().map(|token| token.id));
                }
            }
        }
    }
}

fn next_special(text: &str, specials: &[Special]) -> Option<(usize, &'static str, u32)> {
    specials.iter().filter_map(|&(special, id)| Some((text.find(special)?, special, id))).min_by_key(|&(at, ..)| at)
}

/// Lays tokens out as `chunks` rows: BOS, tokens, EOS and padding in one line, then cut; every row gets the line's first
/// and last id. The two corrections for te2 are sd-scripts' own (strategy_base.py, `_get_input_ids`).
fn rows(tokens: &[u32], chunks: usize, pad: u32) -> Vec<Row> {
    let chunks = chunks.max(1);
    let tokens = &tokens[..tokens.len().min(INNER * chunks)];
    let mut line = vec![pad; INNER * chunks + 2];
    line[0] = BOS;
    line[1..=tokens.len()].copy_from_slice(tokens);
    line[1 + tokens.len()] = EOS;
    let last = line[line.len() - 1];
    line[1..=INNER * chunks]
        .chunks_exact(INNER)
        .map(|inner| {
            let mut row = [last; ROW];
            row[0] = BOS;
            row[1..=INNER].copy_from_slice(inner);
            if chunks > 1 && pad != EOS {
                if row[INNER] != EOS && row[INNER] != pad {
                    row[ROW - 1] = EOS;
                }
                if row[1] == pad {
                    row[1] = EOS;
                }
            }
            row
        })
        .collect()
}
