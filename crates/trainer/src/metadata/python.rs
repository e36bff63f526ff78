//! Values written as Python writes them: `str()` of numbers, flags and nothing, and `json.dumps`.

use serde_json::Value;

/// A value as Python's `str()` writes it.
pub(super) trait Python {
    /// The text.
    fn py(&self) -> String;
}

impl Python for bool {
    fn py(&self) -> String {
        if *self { "True".into() } else { "False".into() }
    }
}

impl Python for f64 {
    /// Shortest digits that give the number back; an exponent below 1e-4 and from 1e16 on, of at least two digits.
    fn py(&self) -> String {
        if !self.is_finite() {
            return if self.is_nan() {
                "nan".into()
            } else if *self > 0.0 {
                "inf".into()
            } else {
                "-inf".into()
            };
        }
        let scientific = format!("{self:e}");
        let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
        let exponent: i32 = exponent.parse().unwrap_or(0);
        if (-4..16).contains(&exponent) {
            let plain = self.to_string();
            if plain.contains('.') { plain } else { plain + ".0" }
        } else {
            format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
        }
    }
}

macro_rules! python_display {
    ($($ty:ty),+) => {$(
        impl Python for $ty {
            fn py(&self) -> String {
                self.to_string()
            }
        }
    )+};
}
python_display!(u32, u64, usize, i64, str, String);

impl<T: Python + ?Sized> Python for &T {
    fn py(&self) -> String {
        (*self).py()
    }
}

impl<T: Python> Python for Option<T> {
    fn py(&self) -> String {
        self.as_ref().map_or_else(|| "None".into(), Python::py)
    }
}

/// JSON as Python's `json.dumps` writes it: blanks after `,` and `:`, ASCII only, floats as [`Python`] writes them.
pub(super) fn dumps(value: &Value) -> String {
    match value {
        Value::Null => "null".into(),
        Value::Bool(b) => b.to_string(),
        Value::Number(n) => {
            if n.is_f64() {
                n.as_f64().unwrap_or(0.0).py()
            } else {
                n.to_string()
            }
        }
        Value::String(s) => quoted(s),
        Value::Array(list) => format!("[{}]", list.iter().map(dumps).collect::<Vec<_>>().join(", ")),
        Value::Object(map) => {
            format!("{{{}}}", map.iter().map(|(k, v)| format!("{}: {}", quoted(k), dumps(v))).collect::<Vec<_>>().join(", "))
        }
    }
}

fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for unit in text.encode_utf16() {
        match u8::try_from(unit) {
            Ok(b'"') => out.push_str("\\\""),
            Ok(b'\\') => out.push_str("\\\\"),
            Ok(b'\n') => out.push_str("\\n"),
            Ok(b'\r') => out.push_str("\\r"),
            Ok(b'\t') => out.push_str("\\t"),
            Ok(8) => out.push_str("\\b"),
            Ok(12) => out.push_str("\\f"),
            Ok(b @ 32..=126) => out.push(char::from(b)),
            _ => out.push_str(&format!("\\u{unit:04x}")),
        }
    }
    out.push('"');
    out
}
