//! Emphasis: the parser by the rules of design facts 9.1, and rows with weights.

use sdxl::tokenizer::{BOS, EOS, INNER, TE2_PAD, Tokenizer, parse_emphasis};

/// Weights are products of factors rounded to f32 once: nothing but the last bit may differ from a literal.
fn parsed(text: &str, expected: &[(&str, f32)]) {
    let got = parse_emphasis(text);
    let same =
        got.len() == expected.len() && got.iter().zip(expected).all(|((a, x), (b, y))| a == b && (x - y).abs() <= f32::EPSILON * y.abs());
    assert!(same, "{text:?} gave {got:?}, not {expected:?}");
}

#[test]
fn brackets_numbers_and_nesting() {
    parsed("", &[("", 1.0)]);
    parsed("()", &[("", 1.0)]);
    parsed("plain", &[("plain", 1.0)]);
    parsed("(a)", &[("a", 1.1)]);
    parsed("[a]", &[("a", 1.0 / 1.1)]);
    parsed("(a:1.5)", &[("a", 1.5)]);
    parsed("(a:-.5) b (c:+2)", &[("a", -0.5), (" b ", 1.0), ("c", 2.0)]);
    parsed("((a) b)", &[("a", 1.21), (" b", 1.1)]);
    parsed("(([a]):2)", &[("a", 2.0)]);
    parsed("(a:1.2)(b:1.2)", &[("ab", 1.2)]);
    parsed("a (b:0) c", &[("a ", 1.0), ("b", 0.0), (" c", 1.0)]);
}

#[test]
fn escapes_are_text_and_a_lone_backslash_vanishes() {
    parsed(r"miku \(vocaloid\)", &[("miku (vocaloid)", 1.0)]);
    parsed(r"(miku \(vocaloid\):1.3)", &[("miku (vocaloid)", 1.3)]);
    parsed(r"\[a\] \\ b\c", &[(r"[a] \ bc", 1.0)]);
    parsed("end\\", &[("end", 1.0)]);
    parsed("\\é", &[("é", 1.0)]);
}

#[test]
fn what_does_not_close_or_open() {
    parsed("(a", &[("a", 1.1)]);
    parsed("a [b (c", &[("a ", 1.0), ("b ", 1.0 / 1.1), ("c", 1.0)]);
    parsed("a) b] c:1.2)", &[("a) b] c:1.2)", 1.0)]);
    parsed("16:9, re:zero (a:b)", &[("16:9, re:zero ", 1.0), ("a:b", 1.1)]);
    // A number weighs round brackets only.
    parsed("[x:1.2]", &[("x:1.2", 1.0 / 1.1)]);
    parsed("(x:1.2.3)", &[("x:1.2.3", 1.1)]);
    parsed("(x:.)", &[("x:.", 1.1)]);
    // Blanks around the number are A1111's, not sd-scripts'.
    parsed("(x: 1.2)", &[("x: 1.2", 1.1)]);
    parsed("(日本:1.2)語", &[("日本", 1.2), ("語", 1.0)]);
}

#[test]
fn pieces_are_tokenized_by_themselves_and_weighted() {
    let tokenizer = Tokenizer::new().unwrap();
    let rows = tokenizer.weighted_rows("(red:1.5)hair", Some(1));
    let (red, hair) = (tokenizer.tokens("red"), tokenizer.tokens("hair"));
    assert_eq!((red.len(), hair.len()), (1, 1));
    assert_eq!(rows.te1[0][..4], [BOS, red[0], hair[0], EOS]);
    assert_eq!(rows.te2[0][..5], [BOS, red[0], hair[0], EOS, TE2_PAD]);
    assert_eq!(rows.te1_weights[0][..4], [1.0, 1.5, 1.0, 1.0]);
    assert_eq!(rows.te1_weights, rows.te2_weights);
    assert!(rows.te1_weights[0][4..].iter().all(|&weight| weight == 1.0));
}

#[test]
fn without_emphasis_the_rows_are_those_of_a_caption() {
    let tokenizer = Tokenizer::new().unwrap();
    for text in ["", "1girl, solo", &"looking at viewer, ".repeat(40)] {
        for chunks in 1..=3 {
            let rows = tokenizer.weighted_rows(text, Some(chunks));
            assert_eq!(rows.te1, tokenizer.te1_rows(text, chunks));
            assert_eq!(rows.te2, tokenizer.te2_rows(text, chunks));
            assert_eq!((&rows.te1_weights, &rows.te2_weights), (&vec![[1.0; 77]; chunks], &vec![[1.0; 77]; chunks]));
        }
    }
}

#[test]
fn a_long_prompt_takes_as_many_rows_as_it_needs() {
    let tokenizer = Tokenizer::new().unwrap();
    assert_eq!(tokenizer.weighted_rows("", None).te1.len(), 1);
    let word = tokenizer.tokens("very")[0];
    let full = "very ".repeat(INNER);
    assert_eq!(tokenizer.weighted_rows(&full, None).te2.len(), 1);
    // The 301st token starts a fifth row, and its weight goes with it.
    let rows = tokenizer.weighted_rows(&format!("{}(very:2)", "very ".repeat(4 * INNER)), None);
    assert_eq!((rows.te1.len(), rows.te2.len(), rows.te1_weights.len()), (5, 5, 5));
    assert_eq!(rows.te1[4][..3], [BOS, word, EOS]);
    assert_eq!(rows.te1_weights[4][..3], [1.0, 2.0, 1.0]);
    assert!(rows.te1[..4].iter().all(|row| row[1..=INNER].iter().all(|&id| id == word)));
    // Rows of te2 that are full end with EOS.
    assert!(rows.te2[..4].iter().all(|row| row[INNER + 1] == EOS));
}

#[test]
fn fixed_rows_cut_a_weighted_caption_off() {
    let tokenizer = Tokenizer::new().unwrap();
    let rows = tokenizer.weighted_rows(&format!("{}(very:2)", "very ".repeat(INNER - 1)), Some(1));
    assert_eq!(rows.te1_weights[0][INNER], 2.0);
    let rows = tokenizer.weighted_rows(&format!("{}(very:2)", "very ".repeat(INNER)), Some(1));
    assert_eq!(rows.te1_weights, vec![[1.0; 77]]);
    assert_eq!(rows.te1[0][INNER + 1], EOS);
}

#[test]
fn te2_reads_exclamation_marks_as_diffusers_or_as_sd_scripts() {
    let tokenizer = Tokenizer::new().unwrap();
    // "!," is one token to te1; to diffusers' tokenizer_2 the "!" is special and the comma stands alone.
    let rows = tokenizer.weighted_rows("(k-on!,:2) x", None);
    let length = |row: &[u32; 77]| row.iter().position(|&id| id == EOS).unwrap();
    assert_eq!(length(&rows.te2[0]), length(&rows.te1[0]) + 1);
    let doubled = |weights: &[f32; 77]| weights.iter().filter(|&&weight| weight == 2.0).count();
    assert_eq!((doubled(&rows.te1_weights[0]), doubled(&rows.te2_weights[0])), (4, 5));
    let plain = Tokenizer::new().unwrap().plain_exclamation_marks(true);
    let (te1, te2) = (plain.te1_rows("k-on!, !? x", 1), plain.te2_rows("k-on!, !? x", 1));
    let end = length(&te1[0]);
    assert_eq!(te1[0][..=end], te2[0][..=end]);
}
