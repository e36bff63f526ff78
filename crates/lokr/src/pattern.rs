//! Target patterns with Python's meaning: `re.match`, anchored at the start only, or `fnmatch`, a shell glob on the whole
//! path (LyCORIS, lycoris/kohya.py `match_fn`). Which layers a match leads to is left to `walk.rs`.

use crate::error::{Error, Result};
use regex::Regex;

/// One entry of a target list: the text as written, and what it matches.
#[derive(Clone, Debug)]
pub struct Pattern {
    text: String,
    regex: Regex,
}

impl Pattern {
    /// Compiles one entry of the list `key`.
    ///
    /// # Errors
    /// [`Error::Pattern`] if `text` is not a regular expression (globs always compile).
    pub fn new(key: &'static str, text: &str, glob: bool) -> Result<Self> {
        let source = if glob { glob_to_regex(text) } else { format!(r"\A(?:{text})") };
        let regex = Regex::new(&source).map_err(|e| Error::Pattern { key, pattern: text.into(), source: Box::new(e) })?;
        Ok(Self { text: text.into(), regex })
    }

    /// The entry as it stands in the preset.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Whether `path` is this very text or matches it.
    pub fn matches(&self, path: &str) -> bool {
        self.text == path || self.regex.is_match(path)
    }
}

/// Python's `fnmatch.translate`: `*`, `?`, `[abc]`, `[a-z]`, `[!abc]`; a bracket without an end is itself.
fn glob_to_regex(glob: &str) -> String {
    let mut out = String::from(r"(?s)\A");
    let mut rest = glob;
    while let Some(c) = rest.chars().next() {
        rest = &rest[c.len_utf8()..];
        match c {
            '*' => out.push_str(".*"),
            '?' => out.push('.'),
            '[' => match class_end(rest) {
                Some(end) => {
                    push_class(&mut out, &rest[..end]);
                    rest = &rest[end + 1..];
                }
                None => out.push_str(r"\["),
            },
            _ => out.push_str(&regex::escape(c.encode_utf8(&mut [0; 4]))),
        }
    }
    out + r"\z"
}

/// Where the class that starts at `rest` ends. A `]` in the first place (after `!`) belongs to the class.
fn class_end(rest: &str) -> Option<usize> {
    let start = usize::from(rest.starts_with('!'));
    let skip = start + usize::from(rest[start..].starts_with(']'));
    rest[skip..].find(']').map(|i| i + skip)
}

fn push_class(out: &mut String, class: &str) {
    let (negated, body) = match class.strip_prefix('!') {
        Some(body) => ("^", body),
        None => ("", class),
    };
    let chars: Vec<char> = body.chars().collect();
    let mut set = String::new();
    let mut i = 0;
    let hex = |c: char| format!(r"\x{{{:x}}}", c as u32);
    while i < chars.len() {
        if chars.get(i + 1) == Some(&'-') && i + 2 < chars.len() {
            // An empty range (z-a) matches nothing in Python.
            if chars[i] <= chars[i + 2] {
                set += &format!("{}-{}", hex(chars[i]), hex(chars[i + 2]));
            }
            i += 3;
        } else {
            set += &hex(chars[i]);
            i += 1;
        }
    }
    match (set.is_empty(), negated) {
        (true, "") => out.push_str(r"[^\x{0}-\x{10FFFF}]"),
        (true, _) => out.push('.'),
        (false, _) => *out += &format!("[{negated}{set}]"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn regex(text: &str, path: &str) -> bool {
        Pattern::new("unet_target_name", text, false).expect("a pattern").matches(path)
    }

    fn glob(text: &str, path: &str) -> bool {
        Pattern::new("unet_target_name", text, true).expect("a glob").matches(path)
    }

    #[test]
    fn a_regular_expression_is_anchored_at_the_start_only() {
        assert!(regex("out", "output_blocks.3.0"));
        assert!(!regex("blocks", "output_blocks.3.0"));
        assert!(regex(".*blocks", "output_blocks.3.0"));
        assert!(regex("a|b", "bx"), "the anchor holds both branches");
        assert!(!regex("a|b", "xb"));
        assert!(regex(r"^out\..+", "out.2") && !regex(r"^out\..+", "output_blocks.0"));
        assert!(regex(r".*input_blocks\.0.+", "input_blocks.0.0") && !regex(r".*input_blocks\.0.+", "input_blocks.0"));
        assert!(regex("", "anything"));
        assert!(regex("out.0", "outx0"), "a dot is any character");
        assert!(regex(r"out\.2$", "out.2") && !regex(r"out\.2$", "out.20"));
    }

    #[test]
    fn a_glob_takes_the_whole_path() {
        assert!(glob("input_blocks.*.proj_in", "input_blocks.4.1.proj_in"), "a star crosses dots");
        assert!(!glob("input_blocks", "input_blocks.4"));
        assert!(!glob("a.b", "axb"), "a dot is a dot");
        assert!(glob("out.?", "out.2") && !glob("out.?", "out.20"));
        assert!(glob("b.[0-3].x", "b.2.x") && !glob("b.[0-3].x", "b.4.x"));
        assert!(glob("b.[!0-3].x", "b.4.x") && !glob("b.[!0-3].x", "b.2.x"));
        assert!(glob("b[", "b[") && glob("b[]]", "b]") && !glob("b[z-a]", "bz") && glob("b[a-]", "b-"));
        assert!(glob("b[^a]", "b^") && glob("b[^a]", "ba"), "only ! negates");
    }

    #[test]
    fn a_broken_pattern_is_named() {
        let error = Pattern::new("unet_target_name", "a(b", false).expect_err("unclosed");
        assert!(error.to_string().contains("`a(b` in `unet_target_name`"), "{error}");
        assert!(error.hint().is_some_and(|h| h.contains("use_fnmatch")));
    }
}
