//! Emphasis in prompts and weighted captions: `(word)`, `[word]`, `(word:1.3)`, by sd-scripts' rules
//! (library/strategy_base.py, `_get_weighted_input_ids`; design facts 9.1), which are A1111's without prompt editing,
//! `BREAK` and commas. Applying the weights to the encoders' outputs is left to the caller.

use super::{EOS, INNER, ROW, Row, SPECIALS, TE2_PAD, Tokenizer, rows};

/// Factor of a pair of round brackets; square ones divide by it.
const STEP: f64 = 1.1;

/// The rows of a weighted prompt for both encoders, and the weight of each position.
#[derive(Debug, Clone, PartialEq)]
pub struct WeightedRows {
    /// Rows for te1.
    pub te1: Vec<Row>,
    /// Rows for te2.
    pub te2: Vec<Row>,
    /// What to multiply te1's hidden state of each position by; 1 for BOS, EOS and padding.
    pub te1_weights: Vec<[f32; ROW]>,
    /// The same for te2, which may cut marks into other tokens.
    pub te2_weights: Vec<[f32; ROW]>,
}

impl Tokenizer {
    /// Rows and weights of a prompt with emphasis. `chunks` fixes the number of rows, as in training
    /// ([`Tokenizer::te1_rows`]); `None` gives as many as the prompt needs, so that nothing is cut off.
    /// Each piece between brackets is tokenized by itself.
    pub fn weighted_rows(&self, text: &str, chunks: Option<usize>) -> WeightedRows {
        let pieces = parse_emphasis(text);
        let read = |specials| {
            let (mut tokens, mut weights) = (Vec::new(), Vec::new());
            for (piece, weight) in &pieces {
                self.push_tokens(piece, specials, &mut tokens);
                weights.resize(tokens.len(), *weight);
            }
            (tokens, weights)
        };
        let (te1, te1_weights) = read(SPECIALS);
        let (te2, te2_weights) = read(self.te2_specials);
        let chunks = chunks.unwrap_or(te1.len().max(te2.len()).div_ceil(INNER)).max(1);
        WeightedRows {
            te1: rows(&te1, chunks, EOS),
            te2: rows(&te2, chunks, TE2_PAD),
            te1_weights: weight_rows(te1_weights, chunks),
            te2_weights: weight_rows(te2_weights, chunks),
        }
    }
}

fn weight_rows(mut weights: Vec<f32>, chunks: usize) -> Vec<[f32; ROW]> {
    weights.resize(INNER * chunks, 1.0);
    let row = |inner: &[f32]| {
        let mut row = [1.0; ROW];
        row[1..=INNER].copy_from_slice(inner);
        row
    };
    weights.chunks_exact(INNER).map(row).collect()
}

/// Splits a prompt into pieces of equal weight.
///
/// `(` and `[` open; `)` closes with factor 1.1, `:number)` with that number, `]` with 1/1.1; nesting multiplies. What is
/// left open acts to the end. `\` before a bracket or another `\` makes it text, and vanishes before anything else. A
/// closing bracket without an opening one is text. An empty prompt is one empty piece of weight 1.
pub fn parse_emphasis(text: &str) -> Vec<(String, f32)> {
    let mut pieces: Vec<(String, f64)> = Vec::new();
    let mut round: Vec<usize> = Vec::new();
    let mut square: Vec<usize> = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let plain = rest.find(['\\', '(', ')', '[', ']', ':']).unwrap_or(rest.len());
        let number = weight_after_colon(rest);
        let (piece, taken) = match first {
            '\\' => match rest[1..].chars().next().filter(|c| "()[]\\".contains(*c)) {
                Some(_) => (Some(&rest[1..2]), 2),
                None => (None, 1),
            },
            '(' => {
                round.push(pieces.len());
                (None, 1)
            }
            '[' => {
                square.push(pieces.len());
                (None, 1)
            }
            ')' => (close(&mut round, &mut pieces, STEP).then_some(")"), 1),
            ']' => (close(&mut square, &mut pieces, 1.0 / STEP).then_some("]"), 1),
            ':' => match number {
                Some((number, length)) => (close(&mut round, &mut pieces, number).then_some(&rest[..length]), length),
                None => (Some(":"), 1),
            },
            _ => (Some(&rest[..plain]), plain),
        };
        if let Some(piece) = piece {
            pieces.push((piece.to_owned(), 1.0));
        }
        rest = &rest[taken..];
    }
    for start in round {
        multiply(&mut pieces[start..], STEP);
    }
    for start in square {
        multiply(&mut pieces[start..], 1.0 / STEP);
    }
    merge_neighbours(pieces)
}

/// Closes the innermost bracket; `true` if there was none, so that the closing one is text.
fn close(open: &mut Vec<usize>, pieces: &mut [(String, f64)], factor: f64) -> bool {
    let Some(start) = open.pop() else { return true };
    multiply(&mut pieces[start..], factor);
    false
}

fn multiply(pieces: &mut [(String, f64)], factor: f64) {
    pieces.iter_mut().for_each(|(_, weight)| *weight *= factor);
}

/// The number of `:number)` at the start of `rest`, and how many bytes the whole takes.
fn weight_after_colon(rest: &str) -> Option<(f64, usize)> {
    let (number, after) = rest.strip_prefix(':')?.split_once(')')?;
    let digits = number.strip_prefix(['+', '-']).unwrap_or(number);
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit() || b == b'.') {
        return None;
    }
    // Digits and dots that make no number, as "1.2.3", stay text.
    let number = number.parse::<f64>().ok()?;
    Some((number, rest.len() - after.len()))
}

fn merge_neighbours(pieces: Vec<(String, f64)>) -> Vec<(String, f32)> {
    let mut merged: Vec<(String, f64)> = Vec::new();
    for (piece, weight) in pieces {
        match merged.last_mut() {
            Some((text, last)) if *last == weight => text.push_str(&piece),
            _ => merged.push((piece, weight)),
        }
    }
    if merged.is_empty() {
        merged.push((String::new(), 1.0));
    }
    merged.into_iter().map(|(text, weight)| (text, weight as f32)).collect()
}
