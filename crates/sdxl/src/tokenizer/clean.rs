//! What happens to a caption before it is cut into words: mojibake, widths, ligatures and quotes are repaired as the
//! Python CLIPTokenizer does where `ftfy` is installed (as sd-scripts requires it), blanks are joined, letters lowered.

use std::borrow::Cow;
use std::sync::LazyLock;

use plsfix::TextFixerConfig;
use regex::Regex;

/// Stands for `&` where entities must survive: a private-use character that no 8-bit encoding has, so it is no mojibake.
const HELD_AMPERSAND: &str = "\u{f5a1}";

static ENTITY: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new("&(?:#?[0-9A-Za-z]{1,24};)").ok());

/// Repairs, joins blanks and lowers a caption.
pub(super) fn clean(text: &str) -> String {
    let fixed = fix(text);
    let mut out = String::with_capacity(fixed.len());
    for word in fixed.split_whitespace() {
        if !out.is_empty() {
            out.push(' ');
        }
        out.push_str(word);
    }
    if out.is_ascii() {
        out.make_ascii_lowercase();
        out
    } else {
        out.to_lowercase()
    }
}

fn fix(text: &str) -> Cow<'_, str> {
    // Printable ASCII without an entity passes all of ftfy's steps unchanged; almost every caption ends here.
    if text.bytes().all(|b| matches!(b, b' '..=b'~' | b'\t' | b'\n' | b'\r') && b != b'&') {
        return Cow::Borrowed(text);
    }
    // Segments longer than this limit would be cut at a byte that need not start a character.
    let config = TextFixerConfig { max_decode_length: i32::MAX, ..TextFixerConfig::default() };
    if !text.contains('<') || text.contains(HELD_AMPERSAND) || !ENTITY.as_ref().is_some_and(|entity| entity.is_match(text)) {
        return Cow::Owned(plsfix::fix_text(text, Some(&config)));
    }
    // ftfy leaves entities alone from the first line on that holds a `<` (the text is taken for HTML); plsfix would not.
    let from = text.find('<').and_then(|at| text[..at].rfind('\n')).map_or(0, |line_end| line_end + 1);
    let (before, html) = text.split_at(from);
    let held = html.replace('&', HELD_AMPERSAND);
    let fixed = plsfix::fix_text(before, Some(&config)) + &plsfix::fix_text(&held, Some(&config));
    Cow::Owned(fixed.replace(HELD_AMPERSAND, "&"))
}
