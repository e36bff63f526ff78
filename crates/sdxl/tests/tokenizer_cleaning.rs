//! What captions go through before they are cut into words, where the golden captions do not reach, and how long the
//! start takes. Expected ids that are not written out come from the same tokenizer on the text after cleaning.

use std::time::{Duration, Instant};

use sdxl::tokenizer::Tokenizer;

#[test]
fn entities_are_resolved_unless_the_text_looks_like_html() {
    let tokenizer = Tokenizer::new().unwrap();
    let same = |a: &str, b: &str| assert_eq!(tokenizer.tokens(a), tokenizer.tokens(b), "{a:?}");
    let other = |a: &str, b: &str| assert_ne!(tokenizer.tokens(a), tokenizer.tokens(b), "{a:?}");
    same("cat &amp; dog", "cat & dog");
    same("cat&nbsp;dog", "cat dog");
    // Once a `<` was seen, entities of its line and the following ones stay.
    other("&amp; <b>", "& <b>");
    same("&amp;\ncat > dog", "&\ncat > dog");
    other("cat <\n&amp;", "cat <\n&");
    same("&amp;\n<b> x", "&\n<b> x");
}

#[test]
fn odd_texts_are_survived() {
    let tokenizer = Tokenizer::new().unwrap();
    let long = "é".repeat(600_000);
    for text in ["\u{feff}", "\0\u{1}\u{1b}[31m red", "&#xD800; &#1114112;", "\u{e000}\u{10ffff}", "Ã©Â\u{a0}â€œ", long.as_str()] {
        tokenizer.encode(text);
        assert_eq!(tokenizer.te2_rows(text, 3).len(), 3);
    }
    assert_eq!(tokenizer.te1_rows("x", 0).len(), 1, "no rows would be no caption");
}

#[test]
fn it_starts_quickly() {
    Tokenizer::new().unwrap();
    let start = Instant::now();
    Tokenizer::new().unwrap();
    // 43 ms on one core of the machine it was written on; the bound leaves room for slow and busy ones.
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
}
