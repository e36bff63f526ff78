//! Pictures drawn by a model: previews of a run, and `lokr sample`.

use std::path::{Path, PathBuf};

use candle_core::Tensor;
use diffusion::{Prediction, Sampler, SamplingPlan, Schedule, Spacing};
use image::RgbImage;
use ops::Value;
use random::{Purpose, Stream};
use sdxl::conditioning::added_condition;
use sdxl::tokenizer::Tokenizer;
use sdxl::vae::LATENT_SCALE;
use sdxl::{GradientCheckpointing, Sdxl, TextCondition};

use crate::config::{PromptConfig, SampleConfig};
use crate::error::{Error, Result};

/// Longest side of a picture: beyond it attention alone would take more memory than any machine of a user has.
const MAX_SIDE: u32 = 8192;

/// One picture to draw.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// The text; `(tag:1.1)` and `\(` are understood.
    pub prompt: String,
    /// What guidance leads away from.
    pub negative_prompt: String,
    /// Width and height in pixels, multiples of 8.
    pub size: (u32, u32),
    /// Seed of the noise.
    pub seed: u64,
    /// Sampling steps.
    pub steps: u32,
    /// Classifier-free guidance; 1 or less: none.
    pub guidance_scale: f64,
    /// Sampler.
    pub sampler: Sampler,
    /// Spacing of the noise levels.
    pub scheduler: Spacing,
}

impl Request {
    /// A prompt of a recipe, with the section's values where it gives none.
    pub fn of(section: &SampleConfig, prompt: &PromptConfig) -> Self {
        Self {
            prompt: prompt.prompt.clone(),
            negative_prompt: prompt.negative_prompt.clone().unwrap_or_else(|| section.negative_prompt.clone()),
            size: (prompt.width.unwrap_or(section.width), prompt.height.unwrap_or(section.height)),
            seed: prompt.seed.unwrap_or(section.seed),
            steps: prompt.steps.unwrap_or(section.steps),
            guidance_scale: prompt.guidance_scale.unwrap_or(section.guidance_scale),
            sampler: section.sampler,
            scheduler: section.scheduler,
        }
    }
}

/// Draws one picture with the model as it is, its adapter attached or not.
///
/// # Errors
/// If the size is no multiple of 8 or the model gives no finite picture.
pub fn draw(model: &Sdxl, tokenizer: &Tokenizer, schedule: &Schedule, prediction: Prediction, r: &Request) -> Result<RgbImage> {
    ops::no_grad(|| draw_recorded(model, tokenizer, schedule, prediction, r))
}

fn draw_recorded(model: &Sdxl, tokenizer: &Tokenizer, schedule: &Schedule, prediction: Prediction, r: &Request) -> Result<RgbImage> {
    let factor = model.vae.factor() as u32;
    let (width, height) = r.size;
    if width == 0 || height == 0 || width % factor != 0 || height % factor != 0 {
        let what = format!("a picture of {width}x{height} cannot be drawn: sides must be multiples of {factor}");
        return Err(Error::refused(
            what,
            format!("take {}x{}", width.max(1).next_multiple_of(factor), height.max(1).next_multiple_of(factor)),
        ));
    }
    if width > MAX_SIDE || height > MAX_SIDE {
        let what = format!("a picture of {width}x{height} cannot be drawn: no side may exceed {MAX_SIDE}");
        return Err(Error::refused(what, "SDXL draws about 1024x1024 well; enlarge the picture afterwards"));
    }
    if !r.guidance_scale.is_finite() {
        return Err(Error::refused(format!("a guidance scale of {} leads nowhere", r.guidance_scale), "5 to 8 is usual"));
    }
    let guided = r.guidance_scale > 1.0;
    let text = encode(model, tokenizer, r, guided)?;
    let n = if guided { 2 } else { 1 };
    // Time ids of both halves: the size itself, uncropped (sd-scripts `sdxl_lpw_stable_diffusion.py`).
    let sizes = [height, width, 0, 0, height, width].map(|v| v as f32);
    let time_ids = Tensor::from_vec(sizes.repeat(n), (n, 6), model.device())?;
    let vector = added_condition(&text.pooled, &time_ids)?;

    let plan = SamplingPlan::new(schedule, r.sampler, r.scheduler, r.steps as usize)?;
    let shape = (1, model.unet.config.in_channels, (height / factor) as usize, (width / factor) as usize);
    let noise = |step: u64| {
        let count = shape.1 * shape.2 * shape.3;
        Tensor::from_vec(Stream::new(r.seed, Purpose::Sampler, 0, step).normal(count), shape, model.device())
    };
    let denoise = |x: &Tensor, t: f64| {
        let x = if guided { Tensor::cat(&[x, x], 0)? } else { x.clone() };
        let t = Tensor::from_vec(vec![t as f32; n], n, model.device())?;
        let out = model.unet.forward(&Value::constant(x), &t, &text.context, &vector, GradientCheckpointing::None)?;
        let out = out.tensor();
        if guided { diffusion::guide(&out.narrow(0, 0, 1)?, &out.narrow(0, 1, 1)?, r.guidance_scale) } else { Ok(out.clone()) }
    };
    let latents = diffusion::sample(&plan, r.sampler, prediction, &noise(0)?, denoise, |i| noise(i as u64 + 1), |_, _| {})?;
    to_image(&model.vae.decode(&(latents / LATENT_SCALE)?)?)
}

/// The condition of the prompt, with the negative prompt's in front if guidance is on. Both get as many rows of 77 as
/// the longer one needs.
fn encode(model: &Sdxl, tokenizer: &Tokenizer, r: &Request, guided: bool) -> Result<TextCondition> {
    let texts: Vec<&str> = if guided { vec![&r.negative_prompt, &r.prompt] } else { vec![&r.prompt] };
    let chunks = texts.iter().map(|t| tokenizer.weighted_rows(t, None).te1.len()).max().unwrap_or(1);
    let (mut ids, mut weights) = ([vec![], vec![]], [vec![], vec![]]);
    for text in texts {
        let rows = tokenizer.weighted_rows(text, Some(chunks));
        ids[0].extend(rows.te1.iter().map(|r| r.to_vec()));
        ids[1].extend(rows.te2.iter().map(|r| r.to_vec()));
        weights[0].extend(rows.te1_weights.concat());
        weights[1].extend(rows.te2_weights.concat());
    }
    let rows = ids[0].len();
    let [w1, w2] = weights.map(|w| Tensor::from_vec(w, (rows, 77), model.device()));
    Ok(model.encode_text(&ids[0], &ids[1], chunks, Some((&w1?, &w2?)), GradientCheckpointing::None)?)
}

/// `(1, 3, h, w)` in [-1, 1] to 8-bit RGB.
fn to_image(pixels: &Tensor) -> Result<RgbImage> {
    let (_, _, h, w) = pixels.dims4()?;
    let values: Vec<f32> = pixels.get(0)?.permute((1, 2, 0))?.flatten_all()?.to_vec1()?;
    if let Some(bad) = values.iter().find(|v| !v.is_finite()) {
        return Err(Error::refused(
            format!("the model drew {bad} instead of a picture"),
            "look at the adapter's file (`lokr inspect`) and at the VAE",
        ));
    }
    let bytes = values.iter().map(|v| ((v / 2.0 + 0.5).clamp(0.0, 1.0) * 255.0).round() as u8).collect();
    RgbImage::from_raw(w as u32, h as u32, bytes).ok_or_else(|| candle_core::Error::Msg(format!("{w}x{h} pixels do not fit")).into())
}

/// Writes a PNG, whole or absent.
///
/// # Errors
/// If it cannot be encoded or written.
pub fn write_png(path: &Path, picture: &RgbImage) -> Result<()> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    picture.write_to(&mut bytes, image::ImageFormat::Png).map_err(|source| Error::Picture { path: path.into(), source })?;
    Ok(storage::write_whole(path, bytes.get_ref())?)
}

/// Puts the pictures of all preview rounds on one sheet, a row for each round, and writes it. `rounds` are paths of PNG
/// files; one that cannot be read leaves its place white.
///
/// # Errors
/// If the sheet cannot be written.
pub fn write_sheet(path: &Path, rounds: &[Vec<PathBuf>]) -> Result<()> {
    const GAP: u32 = 4;
    let read = |p: &PathBuf| image::load_from_memory(&storage::read(p).ok()?).ok().map(|i| i.to_rgb8());
    let rows: Vec<Vec<Option<RgbImage>>> = rounds.iter().map(|row| row.iter().map(read).collect()).collect();
    let side = |f: fn(&RgbImage) -> u32| rows.iter().flatten().flatten().map(f).max().unwrap_or(8);
    let (w, h) = (side(RgbImage::width), side(RgbImage::height));
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0) as u32;
    let size = (GAP + columns * (w + GAP), GAP + rows.len() as u32 * (h + GAP));
    let mut sheet = RgbImage::from_pixel(size.0, size.1, image::Rgb([255; 3]));
    for (y, row) in (0u32..).zip(&rows) {
        for (x, picture) in (0u32..).zip(row) {
            if let Some(picture) = picture {
                image::imageops::replace(&mut sheet, picture, i64::from(GAP + x * (w + GAP)), i64::from(GAP + y * (h + GAP)));
            }
        }
    }
    write_png(path, &sheet)
}
