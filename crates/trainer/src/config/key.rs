//! What a key of the recipe is: name, type, doc, default and its name in sd-scripts, declared once by [`section!`].
//!
//! The reference page, the template, `to_toml`, the suggestions for a mistyped key and the reader all work from these
//! declarations; nothing about a key is written anywhere else.

use std::path::PathBuf;

use toml::Value;

/// A key's name in sd-scripts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The same name.
    Same,
    /// Another name (or several).
    Named(&'static [&'static str]),
    /// sd-scripts has no such option.
    Ours,
}

/// One key of a section.
#[derive(Clone, Debug)]
pub struct Key {
    /// Name within its section.
    pub name: String,
    /// What it does, as one paragraph.
    pub doc: String,
    /// The values it takes, in words.
    pub kind: String,
    /// Its value where the recipe says nothing; `None`: not set.
    pub default: Option<Value>,
    /// A recipe without it is an error.
    pub required: bool,
    /// Its name in sd-scripts.
    pub origin: Origin,
}

/// A value of the recipe: how it is written and read.
pub trait Setting: Sized {
    /// The values that are understood, in words: completes "expected ...".
    fn kind() -> String;
    /// `None` if `value` is not of that kind.
    fn read(value: &Value) -> Option<Self>;
    /// `None` if the key is not set.
    fn write(&self) -> Option<Value>;
}

/// A section whose keys are the fields of a struct.
pub trait Section {
    /// Name in the recipe, as `train`.
    fn name() -> &'static str
    where
        Self: Sized;
    /// What the section is about.
    fn doc() -> String
    where
        Self: Sized;
    /// The keys, in order.
    fn keys() -> Vec<Key>
    where
        Self: Sized;
    /// Sets a key. `None` if there is no such key, `Some(false)` if the value is of the wrong kind.
    fn set(&mut self, key: &str, value: &Value) -> Option<bool>;
    /// Every key with its value, in order.
    fn values(&self) -> Vec<(&'static str, Option<Value>)>;
}

/// Joins the lines of doc comments to one paragraph.
pub(super) fn paragraph(lines: &[&str]) -> String {
    lines.iter().map(|l| l.trim()).collect::<Vec<_>>().join(" ").trim().to_owned()
}

/// Declares a section: `key: Type = default, origin[, required];` with its doc comment. `origin` is `same`, `ours` or
/// `sd("name in sd-scripts", ...)`.
macro_rules! section {
    ($(#[doc = $section_doc:literal])+ $name:ident = $section:literal {
        $($(#[doc = $doc:literal])+ $key:ident: $ty:ty = $default:expr, $origin:ident $(($($sd:literal),+))? $(, $required:ident)?;)+
    }) => {
        $(#[doc = $section_doc])+
        #[derive(Clone, Debug, PartialEq)]
        pub struct $name { $($(#[doc = $doc])+ pub $key: $ty,)+ }

        impl Default for $name {
            fn default() -> Self {
                Self { $($key: $default,)+ }
            }
        }

        impl $crate::config::key::Section for $name {
            fn name() -> &'static str {
                $section
            }

            fn doc() -> String {
                $crate::config::key::paragraph(&[$($section_doc),+])
            }

            fn keys() -> Vec<$crate::config::key::Key> {
                let default = Self::default();
                vec![$($crate::config::key::Key {
                    name: stringify!($key).to_owned(),
                    doc: $crate::config::key::paragraph(&[$($doc),+]),
                    kind: <$ty as $crate::config::key::Setting>::kind(),
                    default: $crate::config::key::Setting::write(&default.$key),
                    required: [$(stringify!($required)),*].contains(&"required"),
                    origin: $crate::config::key::section!(@origin $origin $(($($sd),+))?),
                }),+]
            }

            fn set(&mut self, key: &str, value: &toml::Value) -> Option<bool> {
                match key {
                    $(stringify!($key) => Some(match <$ty as $crate::config::key::Setting>::read(value) {
                        Some(v) => { self.$key = v; true }
                        None => false,
                    }),)+
                    _ => None,
                }
            }

            fn values(&self) -> Vec<(&'static str, Option<toml::Value>)> {
                vec![$((stringify!($key), $crate::config::key::Setting::write(&self.$key))),+]
            }
        }
    };
    (@origin same) => { $crate::config::key::Origin::Same };
    (@origin ours) => { $crate::config::key::Origin::Ours };
    (@origin sd($($sd:literal),+)) => { $crate::config::key::Origin::Named(&[$($sd),+]) };
}
pub(super) use section;

/// Makes an enum with `NAMES`, `name` and `from_name` a [`Setting`].
macro_rules! named_setting {
    ($($ty:ty),+) => {$(
        impl $crate::config::key::Setting for $ty {
            fn kind() -> String {
                $crate::config::key::one_of(Self::NAMES)
            }
            fn read(value: &toml::Value) -> Option<Self> {
                Self::from_name(value.as_str()?)
            }
            fn write(&self) -> Option<toml::Value> {
                Some(self.name().into())
            }
        }
    )+};
}
pub(super) use named_setting;

/// Declares an enum that a recipe chooses by name.
macro_rules! choice {
    ($(#[$meta:meta])* $name:ident { $($(#[$vmeta:meta])* $variant:ident = $text:literal,)+ }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$vmeta])* $variant,)+ }

        impl $name {
            /// Every name that a recipe may use, in the order of the variants.
            pub const NAMES: &'static [&'static str] = &[$($text),+];

            /// The name in recipes and metadata.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $text,)+ }
            }

            /// The variant of that name.
            pub fn from_name(name: &str) -> Option<Self> {
                match name { $($text => Some(Self::$variant),)+ _ => None }
            }
        }
        $crate::config::key::named_setting!($name);
    };
}
pub(super) use choice;

/// "one of `a`, `b`", or "`a`" alone.
pub(super) fn one_of(names: &[&str]) -> String {
    let quoted: Vec<String> = names.iter().map(|n| format!("\"{n}\"")).collect();
    if let [one] = quoted.as_slice() { one.clone() } else { format!("one of {}", quoted.join(", ")) }
}

impl Setting for bool {
    fn kind() -> String {
        "true or false".into()
    }
    fn read(value: &Value) -> Option<Self> {
        value.as_bool()
    }
    fn write(&self) -> Option<Value> {
        Some((*self).into())
    }
}

macro_rules! whole_numbers {
    ($($ty:ty: $kind:literal),+) => {$(
        impl Setting for $ty {
            fn kind() -> String {
                $kind.into()
            }
            fn read(value: &Value) -> Option<Self> {
                value.as_integer()?.try_into().ok()
            }
            fn write(&self) -> Option<Value> {
                // TOML's integers end at i64::MAX, and so does everything that `read` lets in.
                i64::try_from(*self).ok().map(Value::from)
            }
        }
    )+};
}
whole_numbers!(u32: "whole number", u64: "whole number", usize: "whole number", i64: "whole number, also negative");

impl Setting for f64 {
    fn kind() -> String {
        "number".into()
    }
    fn read(value: &Value) -> Option<Self> {
        value.as_float().or_else(|| value.as_integer().map(|i| i as f64)).filter(|x| x.is_finite())
    }
    fn write(&self) -> Option<Value> {
        Some((*self).into())
    }
}

impl Setting for String {
    fn kind() -> String {
        "text".into()
    }
    fn read(value: &Value) -> Option<Self> {
        value.as_str().map(str::to_owned)
    }
    fn write(&self) -> Option<Value> {
        Some(self.as_str().into())
    }
}

impl Setting for PathBuf {
    fn kind() -> String {
        "path".into()
    }
    fn read(value: &Value) -> Option<Self> {
        value.as_str().map(PathBuf::from)
    }
    fn write(&self) -> Option<Value> {
        Some(self.to_string_lossy().as_ref().into())
    }
}

impl<T: Setting> Setting for Option<T> {
    fn kind() -> String {
        T::kind()
    }
    fn read(value: &Value) -> Option<Self> {
        T::read(value).map(Some)
    }
    fn write(&self) -> Option<Value> {
        self.as_ref().and_then(T::write)
    }
}

impl<T: Setting> Setting for Vec<T> {
    fn kind() -> String {
        format!("list, each entry {}", T::kind())
    }
    fn read(value: &Value) -> Option<Self> {
        value.as_array()?.iter().map(T::read).collect()
    }
    fn write(&self) -> Option<Value> {
        Some(Value::Array(self.iter().filter_map(T::write).collect()))
    }
}

impl Setting for [f64; 2] {
    fn kind() -> String {
        "list of two numbers".into()
    }
    fn read(value: &Value) -> Option<Self> {
        Vec::<f64>::read(value)?.try_into().ok()
    }
    fn write(&self) -> Option<Value> {
        self.to_vec().write()
    }
}

named_setting!(diffusion::LossType, diffusion::HuberSchedule, diffusion::Sampler, diffusion::Spacing);
