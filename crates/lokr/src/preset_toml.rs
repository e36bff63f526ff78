//! Reading a preset's TOML with the line of every key, so that a message can point at it. Meaning is left to `preset.rs`.

use crate::error::{Error, Result, nearest};
use crate::preset::Overrides;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// Keys of a preset.
pub(crate) const PRESET_KEYS: &[&str] = &[
    "enable_conv",
    "unet_target_module",
    "unet_target_name",
    "text_encoder_target_module",
    "text_encoder_target_name",
    "module_algo_map",
    "name_algo_map",
    "use_fnmatch",
    "exclude_name",
];

/// Keys of a table inside one of the maps.
const OVERRIDE_KEYS: &[&str] = &[
    "algo",
    "dim",
    "alpha",
    "factor",
    "full_matrix",
    "decompose_both",
    "use_tucker",
    "use_scalar",
    "rs_lora",
    "unbalanced_factorization",
    "bypass_mode",
    "weight_decompose",
    "wd_on_out",
    "rank_dropout_scale",
    "rank_dropout",
    "module_dropout",
    "dropout",
];

/// Doubles the backslashes of double-quoted names in table headers, so that they are read as they are written. LyCORIS reads
/// presets with the Python package `toml`, which resolves no escapes there: `[name_algo_map."out\\.2$"]` is the pattern
/// `out\\.2$` with two backslashes to it, which matches nothing. A preset must choose the same layers here as there.
pub(crate) fn keep_header_escapes(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for line in text.split_inclusive('\n') {
        if !line.trim_start().starts_with('[') {
            out.push_str(line);
            continue;
        }
        let mut quote = None;
        for c in line.chars() {
            match (quote, c) {
                (None, '#') | (None, '"' | '\'') => quote = Some(c),
                (Some(q), c) if q == c && q != '#' => quote = None,
                (Some('"'), '\\') => out.push('\\'),
                _ => {}
            }
            out.push(c);
        }
    }
    out
}

/// A parsed text.
pub(crate) struct Reader<'a> {
    origin: &'a str,
    text: &'a str,
    root: Spanned<DeTable<'a>>,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(origin: &'a str, text: &'a str) -> Result<Self> {
        let root = DeTable::parse(text).map_err(|e| Error::PresetSyntax { origin: origin.into(), source: Box::new(e) })?;
        Ok(Self { origin, text, root })
    }

    /// The top table, if it has no key but `keys`.
    pub(crate) fn table(&'a self, keys: &[&str]) -> Result<Table<'a>> {
        let table = Table { reader: self, prefix: String::new(), table: self.root.get_ref() };
        table.check(keys)?;
        Ok(table)
    }

    fn line(&self, offset: usize) -> usize {
        1 + self.text.as_bytes().iter().take(offset).filter(|&&b| b == b'\n').count()
    }
}

/// A table with the path to it.
pub(crate) struct Table<'a> {
    reader: &'a Reader<'a>,
    prefix: String,
    table: &'a DeTable<'a>,
}

impl<'a> Table<'a> {
    fn full(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    fn check(&self, keys: &[&str]) -> Result<()> {
        let unknown = self.table.keys().filter(|k| !keys.contains(&k.get_ref().as_ref())).min_by_key(|k| k.span().start);
        let Some(key) = unknown else { return Ok(()) };
        Err(Error::UnknownKey {
            origin: self.reader.origin.into(),
            line: self.reader.line(key.span().start),
            key: self.full(key.get_ref()),
            nearest: nearest(key.get_ref(), keys.iter().copied()),
        })
    }

    fn get(&self, key: &str) -> Option<&'a Spanned<DeValue<'a>>> {
        self.table.iter().find(|(k, _)| k.get_ref() == key).map(|(_, v)| v)
    }

    fn wrong<T>(&self, key: &str, value: &Spanned<DeValue>, expected: &'static str, found: impl Into<String>) -> Result<T> {
        let line = self.reader.line(value.span().start);
        Err(Error::PresetValue { origin: self.reader.origin.into(), line, key: self.full(key), expected, found: found.into() })
    }

    pub(crate) fn bool(&self, key: &str) -> Result<Option<bool>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.get_ref().as_bool() {
            Some(b) => Ok(Some(b)),
            None => self.wrong(key, value, "true or false", kind(value)),
        }
    }

    pub(crate) fn strings(&self, key: &str) -> Result<Option<Vec<String>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let Some(list) = value.get_ref().as_array() else { return self.wrong(key, value, "a list of strings", kind(value)) };
        let mut out = Vec::new();
        for item in list.iter() {
            match item.get_ref().as_str() {
                Some(s) => out.push(s.to_string()),
                None => return self.wrong(key, item, "a list of strings", format!("a list with {}", kind(item))),
            }
        }
        Ok(Some(out))
    }

    fn integer(&self, key: &str) -> Result<Option<i64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match number(value) {
            Some(x) if x.fract() == 0.0 && x.abs() <= 9e15 => Ok(Some(x as i64)),
            Some(x) => self.wrong(key, value, "a whole number", x.to_string().to_lowercase()),
            None => self.wrong(key, value, "a whole number", kind(value)),
        }
    }

    fn dim(&self, key: &str) -> Result<Option<usize>> {
        let Some(n) = self.integer(key)? else { return Ok(None) };
        match (usize::try_from(n), self.get(key)) {
            (Ok(n), _) => Ok(Some(n)),
            (Err(_), Some(value)) => self.wrong(key, value, "a whole number, 0 or more", n.to_string()),
            (Err(_), None) => Ok(None),
        }
    }

    fn finite(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match number(value) {
            Some(x) if x.is_finite() => Ok(Some(x)),
            Some(x) => self.wrong(key, value, "a finite number", x.to_string().to_lowercase()),
            None => self.wrong(key, value, "a finite number", kind(value)),
        }
    }

    /// The tables of one of the two maps, in file order.
    pub(crate) fn overrides(&self, key: &str) -> Result<Vec<(String, Overrides)>> {
        let Some(value) = self.get(key) else { return Ok(Vec::new()) };
        let Some(map) = value.get_ref().as_table() else { return self.wrong(key, value, "a table", kind(value)) };
        let mut entries: Vec<_> = map.iter().collect();
        entries.sort_by_key(|(name, _)| name.span().start);
        let mut out = Vec::new();
        for (name, value) in entries {
            let name = name.get_ref().to_string();
            let Some(table) = value.get_ref().as_table() else {
                return self.wrong(&format!("{key}.{name}"), value, "a table", kind(value));
            };
            let inner = Table { reader: self.reader, prefix: format!("{}.{name}.", self.full(key)), table };
            out.push((name, inner.options()?));
        }
        Ok(out)
    }

    fn options(&self) -> Result<Overrides> {
        self.check(OVERRIDE_KEYS)?;
        if let Some(value) = self.get("algo") {
            match value.get_ref().as_str() {
                Some(algo) if algo.eq_ignore_ascii_case("lokr") => {}
                Some(_) => return self.unsupported("algo", "lokr is the only algorithm here"),
                None => return self.wrong("algo", value, "a string", kind(value)),
            }
        }
        if self.bool("weight_decompose")? == Some(true) {
            return self.unsupported("weight_decompose", "DoRA needs a forward of its own");
        }
        if self.bool("rank_dropout_scale")? == Some(true) {
            return self.unsupported("rank_dropout_scale", "there is no rank dropout");
        }
        self.bool("wd_on_out")?;
        for key in ["rank_dropout", "module_dropout", "dropout"] {
            if self.finite(key)?.is_some_and(|p| p != 0.0) {
                return self.unsupported(key, "dropout inside the adapter is not written (in LyCORIS no preset table can set it either)");
            }
        }
        Ok(Overrides {
            dim: self.dim("dim")?.filter(|&dim| dim != 0),
            alpha: self.finite("alpha")?.filter(|&alpha| alpha != 0.0),
            factor: self.integer("factor")?,
            full_matrix: self.bool("full_matrix")?,
            decompose_both: self.bool("decompose_both")?,
            use_tucker: self.bool("use_tucker")?,
            use_scalar: self.bool("use_scalar")?,
            rs_lora: self.bool("rs_lora")?,
            unbalanced_factorization: self.bool("unbalanced_factorization")?,
            bypass_mode: self.bool("bypass_mode")?,
        })
    }

    fn unsupported<T>(&self, key: &str, why: &'static str) -> Result<T> {
        Err(Error::Unsupported { key: self.full(key), why })
    }
}

fn number(value: &Spanned<DeValue>) -> Option<f64> {
    match value.get_ref() {
        DeValue::Integer(i) => i64::from_str_radix(i.as_str(), i.radix()).ok().map(|i| i as f64),
        DeValue::Float(f) => f.as_str().parse().ok(),
        _ => None,
    }
}

fn kind(value: &Spanned<DeValue>) -> &'static str {
    match value.get_ref() {
        DeValue::String(_) => "a string",
        DeValue::Integer(_) => "an integer",
        DeValue::Float(_) => "a float",
        DeValue::Boolean(_) => "a boolean",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    }
}
