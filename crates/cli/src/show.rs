//! What the terminal shows: lines, the progress bar, errors.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use trainer::Error;
use trainer::event::{Event, StepReport};

/// Prints events; holds the bar while training.
#[derive(Default)]
pub struct Watcher {
    bar: Option<ProgressBar>,
    preparing: Option<(&'static str, ProgressBar)>,
}

impl Watcher {
    /// Shows one event.
    pub fn event(&mut self, event: Event) {
        match event {
            Event::Note(text) => self.line(&text),
            Event::Warning(text) => self.line(&format!("warning: {text}")),
            Event::Wrote(what, path) => self.line(&format!("wrote {what} {}", path.display())),
            Event::Preparing(what, done, total) => self.prepare(what, done, total),
            Event::Start { done, total } => self.start(done, total),
            Event::Step(report) => self.step(&report),
        }
    }

    /// Takes the bar away.
    pub fn done(&mut self) {
        self.end_preparing();
        if let Some(bar) = self.bar.take() {
            bar.finish();
        }
    }

    fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| println!("{text}")),
            None => println!("{text}"),
        }
    }

    /// A bar for each kind of work; the next kind takes its place.
    fn prepare(&mut self, what: &'static str, done: usize, total: usize) {
        if self.preparing.as_ref().is_none_or(|(shown, _)| *shown != what) {
            self.end_preparing();
            let template = if total > 0 { "{msg} {bar:30} {pos}/{len} {eta} left" } else { "{msg} {pos}" };
            let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
            let bar = ProgressBar::new(total as u64).with_style(style).with_message(what);
            self.preparing = Some((what, bar));
        }
        if let Some((_, bar)) = &self.preparing {
            bar.set_length(total as u64);
            bar.set_position(done as u64);
        }
        if what == "latents" && done >= total {
            self.end_preparing();
            self.line(&format!("{what}: {total} encoded"));
        }
    }

    fn end_preparing(&mut self) {
        if let Some((_, bar)) = self.preparing.take() {
            bar.finish_and_clear();
        }
    }

    fn start(&mut self, done: u64, total: u64) {
        let style = ProgressStyle::with_template("{bar:24} {pos}/{len} {msg} {eta} left").unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = ProgressBar::new(total).with_style(style).with_position(done);
        bar.reset_eta();
        bar.enable_steady_tick(Duration::from_millis(500));
        self.bar = Some(bar);
    }

    fn step(&mut self, r: &StepReport) {
        let mut text = format!("loss {:.4} lr {:.2e} {:.2} images/s", r.loss_average, r.lr_unet, r.images_per_second);
        if let (Some(scale), Some(overflows)) = (r.loss_scale, r.overflows) {
            text += &format!(" scale {scale} skipped {overflows}");
        }
        if let Some(bar) = &self.bar {
            bar.set_position(r.step);
            bar.set_message(text.clone());
        }
        if self.bar.as_ref().is_some_and(ProgressBar::is_hidden) && (r.step.is_power_of_two() || r.step.is_multiple_of(50)) {
            // Without a terminal there is no bar: a line now and then.
            println!("step {} {text}", r.step);
        }
    }
}

/// Prints an error: the chain of causes once, then the way out.
pub fn error(error: &Error) {
    eprintln!("error: {error}");
    let mut cause = std::error::Error::source(error);
    let mut above = error.to_string();
    while let Some(c) = cause {
        let text = c.to_string();
        // Transparent errors repeat themselves in the chain.
        if text != above {
            eprintln!("  because: {text}");
        }
        above = text;
        cause = c.source();
    }
    if let Some(hint) = error.hint() {
        for line in hint.lines() {
            eprintln!("hint: {line}");
        }
    }
}
