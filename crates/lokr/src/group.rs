//! The three networks of SDXL that an adapter may train, and how a layer of each is called in a file.

use sdxl::checkpoint::Part;

/// A network of SDXL: what belongs together in learning rates, tables and names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ParameterGroup {
    /// CLIP-L.
    TextEncoder1,
    /// OpenCLIP bigG.
    TextEncoder2,
    /// The UNet.
    Unet,
}

impl ParameterGroup {
    /// All of them, in the order of files and of LyCORIS.
    pub const ALL: [Self; 3] = [Self::TextEncoder1, Self::TextEncoder2, Self::Unet];

    /// The adaptable network that a part of a checkpoint is; `None` for the VAE.
    pub fn of(part: Part) -> Option<Self> {
        match part {
            Part::TextEncoder1 => Some(Self::TextEncoder1),
            Part::TextEncoder2 => Some(Self::TextEncoder2),
            Part::Unet => Some(Self::Unet),
            Part::Vae => None,
        }
    }

    /// Whether it is one of the two text encoders.
    pub fn is_text_encoder(self) -> bool {
        self != Self::Unet
    }

    /// Prefix of its modules in a file (lycoris/kohya.py, with a list of two text encoders).
    pub fn prefix(self) -> &'static str {
        match self {
            Self::TextEncoder1 => "lora_te1",
            Self::TextEncoder2 => "lora_te2",
            Self::Unet => "lora_unet",
        }
    }

    /// A layer's name in a file: prefix and path, dots as underscores.
    pub fn kohya_name(self, path: &str) -> String {
        format!("{}_{}", self.prefix(), path.replace('.', "_"))
    }
}

impl std::fmt::Display for ParameterGroup {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::TextEncoder1 => "text encoder 1",
            Self::TextEncoder2 => "text encoder 2",
            Self::Unet => "UNet",
        })
    }
}
