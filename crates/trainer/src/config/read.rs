//! From the text of a recipe, and `--set` arguments, to a [`RunConfig`]: strict, with a place for every fault.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use diffusion::{LossConfig, LossType, NoiseConfig};
use optim::{ScheduleKind, ScheduleOptions};
use toml::de::{DeTable, DeValue};
use toml::{Table, Value};

use super::dataset::{self as data, CacheConfig, SUBSETS};
use super::error::{ConfigError, Fault, Place};
use super::key::{Key, Section, Setting};
use super::render::show;
use super::sections::PromptConfig;
use super::suggest::{unknown, unknown_section, wrong_kind};
use super::{RunConfig, catalog};

/// A recipe as typed.
struct Recipe {
    file: PathBuf,
    table: Table,
    /// Where each dotted path was written.
    places: HashMap<String, Place>,
    faults: Vec<Fault>,
}

/// Reads `text`, which came from `file`, with `overrides` (`section.key=value`) laid over it.
pub(super) fn read(text: &str, file: &Path, overrides: &[String]) -> Result<RunConfig, ConfigError> {
    let mut recipe = Recipe::parse(text, file)?;
    for argument in overrides {
        recipe.lay_over(argument);
    }
    let config = recipe.build();
    let mut faults = recipe.faults;
    if faults.is_empty() {
        return Ok(config);
    }
    // The order of the text, then that of the command line.
    faults.sort_by_key(|f| match f.place {
        Place::Line { line, .. } => line,
        Place::File(_) => usize::MAX - 1,
        Place::Override(_) => usize::MAX,
    });
    Err(ConfigError::Faults(faults))
}

impl Recipe {
    fn parse(text: &str, file: &Path) -> Result<Self, ConfigError> {
        let syntax = |e: toml::de::Error| {
            let offset = e.span().map_or(0, |s| s.start.min(text.len()));
            let line_start = text.as_bytes()[..offset].iter().rposition(|b| *b == b'\n').map_or(0, |i| i + 1);
            let column = String::from_utf8_lossy(&text.as_bytes()[line_start..offset]).chars().count() + 1;
            ConfigError::Syntax { place: Place::line(file, text, offset), column, what: e.message().to_owned() }
        };
        let spans = DeTable::parse(text).map_err(syntax)?;
        let table: Table = text.parse().map_err(syntax)?;
        let mut places = HashMap::new();
        collect_places(spans.get_ref(), "", &mut |path, offset| {
            places.insert(path, Place::line(file, text, offset));
        });
        Ok(Self { file: file.to_owned(), table, places, faults: Vec::new() })
    }

    fn place(&self, path: &str) -> Place {
        self.places.get(path).cloned().unwrap_or_else(|| Place::File(self.file.clone()))
    }

    /// `section.key=value`; the value in TOML's syntax, or a text without quotes.
    fn lay_over(&mut self, argument: &str) {
        let place = Place::Override(argument.to_owned());
        let form = |what: &str| Fault {
            place: place.clone(),
            what: what.to_owned(),
            hint: Some("write section.key=value, as train.seed=1 or dataset.subsets[0].num_repeats=2".into()),
        };
        let Some((path, text)) = argument.split_once('=') else {
            return self.faults.push(form("no `=`"));
        };
        let (path, text) = (path.trim(), text.trim());
        let Some((section, key)) = path.rsplit_once('.') else {
            return self.faults.push(form("no section"));
        };
        let typed = format!("value = {text}").parse::<Table>().ok().and_then(|mut t| t.remove("value"));
        let bare = Value::String(text.to_owned());
        let name = section.split('[').next().unwrap_or(section);
        let value = match typed {
            // `output.name=2024` is a text although it reads like a number.
            Some(value) if accepts(name, key, &value) || !accepts(name, key, &bare) => value,
            _ => bare,
        };
        let Some(table) = descend(&mut self.table, section) else {
            return self.faults.push(form("no such place"));
        };
        table.insert(key.to_owned(), value);
        self.places.insert(path.to_owned(), place);
    }

    fn build(&mut self) -> RunConfig {
        let mut config = RunConfig::default();
        for (name, value) in self.table.clone() {
            let Value::Table(table) = value else {
                let fault = if catalog().iter().any(|s| s.name == name) {
                    let what = format!("`{name}` is a section, not a key");
                    Fault { place: self.place(&name), what, hint: Some(format!("write [{name}] and its keys under it")) }
                } else {
                    unknown("", &name, self.place(&name))
                };
                self.faults.push(fault);
                continue;
            };
            match config.section_mut(&name) {
                _ if name == "dataset" => self.dataset(&table, &mut config),
                Some(section) => self.section(&name, &table, section),
                None => {
                    self.faults.push(unknown_section(&name, self.place(&name)));
                    // sd-scripts ignores sections; whoever brings its file learns where each key belongs.
                    for key in table.keys() {
                        let fault = unknown("", key, self.place(&format!("{name}.{key}")));
                        self.faults.extend(fault.hint.is_some().then_some(fault));
                    }
                }
            }
        }
        self.require();
        config.settle(&|path| self.places.contains_key(path));
        config
    }

    fn section(&mut self, name: &str, table: &Table, section: &mut dyn Section) {
        for (key, value) in table {
            let path = format!("{name}.{key}");
            if path == "sample.prompts" && self.prompts(value) {
                continue;
            }
            match section.set(key, value) {
                None => self.faults.push(unknown(name, key, self.place(&path))),
                Some(false) => self.wrong(name, key, &path, value),
                Some(true) => (),
            }
        }
    }

    /// Looks into the tables of `sample.prompts`; true if one of them is at fault.
    fn prompts(&mut self, value: &Value) -> bool {
        let before = self.faults.len();
        for (i, entry) in value.as_array().into_iter().flatten().enumerate() {
            for (key, value) in entry.as_table().into_iter().flatten() {
                let path = format!("sample.prompts[{i}].{key}");
                match PromptConfig::default().set(key, value) {
                    None => self.faults.push(unknown("sample.prompts", key, self.place(&path))),
                    Some(false) => self.wrong("sample.prompts", key, &path, value),
                    Some(true) => (),
                }
            }
        }
        self.faults.len() > before
    }

    fn dataset(&mut self, table: &Table, config: &mut RunConfig) {
        let has = |keys: &[Key], key: &str| keys.iter().any(|k| k.name == key);
        let (own, of_subsets) = (data::dataset_keys(), data::subset_keys());
        let (mut whole, mut common, mut subsets) = (Table::new(), Table::new(), Vec::new());
        for (key, value) in table {
            let path = format!("dataset.{key}");
            if key == SUBSETS {
                subsets = self.subsets(value);
            } else if let Some(fits) = config.cache.set(key, value) {
                if !fits {
                    self.wrong("dataset", key, &path, value);
                }
            } else if has(&own, key) || (has(&of_subsets, key) && key != "image_dir") {
                let (subset, section) = if has(&own, key) { (false, "dataset") } else { (true, "dataset.subsets") };
                if data::fits(subset, key, value) {
                    if subset { &mut common } else { &mut whole }.insert(key.clone(), value.clone());
                } else {
                    self.wrong(section, key, &path, value);
                }
            } else {
                self.faults.push(unknown("dataset", key, self.place(&path)));
            }
        }
        let merged = subsets.into_iter().map(|subset| {
            let mut table = common.clone();
            table.extend(subset);
            Value::Table(table)
        });
        whole.insert(SUBSETS.to_owned(), Value::Array(merged.collect()));
        match Value::Table(whole).try_into() {
            Ok(dataset) => config.dataset = dataset,
            // Each key was tried by itself, so this takes a rule between keys that only serde knows.
            Err(e) => self.faults.push(Fault { place: self.place("dataset"), what: format!("[dataset]: {}", e.message()), hint: None }),
        }
    }

    /// The subsets' tables, their faulty keys left out.
    fn subsets(&mut self, value: &Value) -> Vec<Table> {
        let keys = data::subset_keys();
        let Some(tables) = value.as_array().and_then(|list| list.iter().map(|v| v.as_table().cloned()).collect::<Option<Vec<_>>>()) else {
            self.faults.push(Fault {
                place: self.place("dataset.subsets"),
                what: "dataset.subsets: expected a list of tables".into(),
                hint: Some("write [[dataset.subsets]], with two brackets, before each subset's keys".into()),
            });
            return Vec::new();
        };
        let mut kept = Vec::new();
        for (i, mut table) in tables.into_iter().enumerate() {
            table.retain(|key, value| {
                let path = format!("dataset.subsets[{i}].{key}");
                if !keys.iter().any(|k| k.name == *key) {
                    self.faults.push(unknown("dataset.subsets", key, self.place(&path)));
                    false
                } else if !data::fits(true, key, value) {
                    self.wrong("dataset.subsets", key, &path, value);
                    false
                } else {
                    true
                }
            });
            kept.push(table);
        }
        kept
    }

    fn wrong(&mut self, section: &str, key: &str, path: &str, value: &Value) {
        let kind = catalog().iter().filter(|s| s.name == section).flat_map(|s| &s.keys).find(|k| k.name == key).map(|k| k.kind.clone());
        let fault = wrong_kind(path, &kind.unwrap_or_default(), value, self.place(path));
        self.faults.push(fault);
    }

    /// Faults for required keys that are nowhere.
    fn require(&mut self) {
        for section in catalog().iter().filter(|s| !s.name.contains('.')) {
            for key in section.keys.iter().filter(|k| k.required) {
                let path = format!("{}.{}", section.name, key.name);
                if !self.places.contains_key(&path) {
                    let hint = format!("add to [{}]: {} = \"...\" ({})", section.name, key.name, key.doc.trim_end_matches('.'));
                    self.faults.push(Fault { place: Place::File(self.file.clone()), what: format!("{path} is missing"), hint: Some(hint) });
                }
            }
        }
    }
}

/// Whether `section.key` takes `value`.
fn accepts(section: &str, key: &str, value: &Value) -> bool {
    let subset = section == "dataset.subsets" || data::subset_keys().iter().any(|k| k.name == key);
    match section {
        "dataset" | "dataset.subsets" => CacheConfig::default().set(key, value).unwrap_or_else(|| data::fits(subset, key, value)),
        _ => RunConfig::default().section_mut(section).is_some_and(|s| s.set(key, value) == Some(true)),
    }
}

/// The table at `path` ("dataset.subsets[1]"), made where it is missing; the entry after the last one of a list too.
fn descend<'t>(table: &'t mut Table, path: &str) -> Option<&'t mut Table> {
    let mut here = table;
    for part in path.split('.') {
        let (name, index) = match part.split_once('[') {
            Some((name, index)) => (name, Some(index.strip_suffix(']')?.parse::<usize>().ok()?)),
            None => (part, None),
        };
        let empty = if index.is_some() { Value::Array(Vec::new()) } else { Value::Table(Table::new()) };
        let entry = here.entry(name.to_owned()).or_insert(empty);
        here = match index {
            None => entry.as_table_mut()?,
            Some(index) => {
                let list = entry.as_array_mut()?;
                if index == list.len() {
                    list.push(Value::Table(Table::new()));
                }
                list.get_mut(index)?.as_table_mut()?
            }
        };
    }
    Some(here)
}

/// Calls `found` with every dotted path and the offset at which it was written.
fn collect_places(table: &DeTable<'_>, prefix: &str, found: &mut impl FnMut(String, usize)) {
    for (key, value) in table.iter() {
        let path = if prefix.is_empty() { key.get_ref().to_string() } else { format!("{prefix}.{}", key.get_ref()) };
        match value.get_ref() {
            DeValue::Table(inner) => collect_places(inner, &path, found),
            DeValue::Array(list) => {
                for (i, entry) in list.iter().enumerate() {
                    if let DeValue::Table(inner) = entry.get_ref() {
                        collect_places(inner, &format!("{path}[{i}]"), found);
                    }
                }
            }
            _ => (),
        }
        found(path, key.span().start);
    }
}

impl RunConfig {
    /// Fills in what follows from other keys, so that a written recipe says what was used. `given`: whether a path was written.
    fn settle(&mut self, given: &dyn Fn(&str) -> bool) {
        let (train, network) = (&mut self.train, &mut self.network);
        let hyper = optim::Hyper::defaults(train.optimizer);
        train.betas.get_or_insert([hyper.betas.0, hyper.betas.1]);
        train.weight_decay.get_or_insert(hyper.weight_decay);
        let (loss, schedule, noise) = (LossConfig::default(), ScheduleOptions::default(), NoiseConfig::default());
        if matches!(train.loss_type, LossType::Huber | LossType::SmoothL1) {
            train.huber_schedule.get_or_insert(loss.huber_schedule);
            train.huber_c.get_or_insert(loss.huber_c);
            train.huber_scale.get_or_insert(loss.huber_scale);
        }
        match train.lr_scheduler {
            ScheduleKind::CosineWithRestarts => _ = train.lr_scheduler_num_cycles.get_or_insert(schedule.num_cycles),
            ScheduleKind::CosineWithMinLr => {
                train.lr_scheduler_num_cycles.get_or_insert(schedule.num_cycles);
                train.lr_scheduler_min_lr_ratio.get_or_insert(schedule.min_lr_ratio);
            }
            ScheduleKind::Polynomial => _ = train.lr_scheduler_power.get_or_insert(schedule.power),
            _ => (),
        }
        if train.multires_noise_iterations.is_some_and(|n| n > 0) {
            train.multires_noise_discount.get_or_insert(noise.multires_noise_discount);
        }
        network.conv_dim.get_or_insert(network.dim);
        network.conv_alpha.get_or_insert(network.alpha);
        self.cache.cache_latents |= self.cache.cache_latents_to_disk;
        if train.compat.is_some() && !given("dataset.crop_condition") {
            self.dataset.crop_condition = ::dataset::CropCondition::SdScripts;
        }
    }
}

/// A value as a recipe writes it.
pub(super) fn written<T: Setting>(value: &T) -> String {
    value.write().map_or_else(|| "(not set)".into(), |v| show(&v))
}
