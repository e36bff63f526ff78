//! The buckets of a dataset for people: lines of text with bars, and a picture (SVG) of the same.

use std::fmt::Write;

use crate::BucketCount;

/// Length of the longest bar of the text, in characters.
const BAR: usize = 40;

/// One line for each bucket: size, images, the last batch's images if it is short, mean crop loss, enlarged images, a bar.
pub fn text(buckets: &[BucketCount], batch_size: usize) -> String {
    let most = buckets.iter().map(|b| b.visits).max().unwrap_or(0).max(1);
    let mut out = String::from("     bucket     images    visits  last batch  crop loss  enlarged\n");
    for b in buckets {
        let left = left_over(b, batch_size);
        let last = if left == 0 { "-".into() } else { format!("{left} of {batch_size}") };
        // At least one character for a bucket that is in use.
        let bar = "#".repeat(((b.visits as u128 * BAR as u128).div_ceil(u128::from(most))) as usize);
        let _ = writeln!(
            out,
            "{:>5}x{:<5} {:>10} {:>9} {last:>11} {:>8.1} % {:>9}  {bar}",
            b.size.0,
            b.size.1,
            b.images,
            b.visits,
            b.crop_loss * 100.0,
            b.enlarged
        );
    }
    let (images, visits) = buckets.iter().fold((0, 0), |sum, b| (sum.0 + b.images, sum.1 + b.visits));
    let batches: u64 = buckets.iter().map(|b| b.visits.div_ceil(batch_size.max(1) as u64)).sum();
    let short = buckets.iter().filter(|b| left_over(b, batch_size) > 0).count();
    let loss = buckets.iter().map(|b| b.crop_loss * b.images as f64).sum::<f64>() / (images as f64).max(1.0);
    let _ = writeln!(
        out,
        "{} buckets, {images} images, {visits} visits in {batches} batches of {batch_size}, {short} of them short; mean crop loss {:.1} %; every image is used",
        buckets.len(),
        loss * 100.0
    );
    out
}

/// Visits in a bucket's last batch, if that is short; else 0.
fn left_over(bucket: &BucketCount, batch_size: usize) -> u64 {
    bucket.visits % batch_size.max(1) as u64
}

/// A picture of the histogram: a bar for each bucket, as long as it has visits, the darker the more is cropped.
pub fn svg(buckets: &[BucketCount], batch_size: usize) -> String {
    const ROW: usize = 18;
    const LEFT: usize = 110;
    const WIDTH: usize = 640;
    let most = buckets.iter().map(|b| b.visits).max().unwrap_or(0).max(1) as f64;
    let height = 50 + ROW * buckets.len();
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{0}\" height=\"{height}\" viewBox=\"0 0 {0} {height}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n<text x=\"10\" y=\"24\" font-size=\"15\">Visits per bucket, \
         batches of {batch_size}</text>\n",
        LEFT + WIDTH + 230
    );
    for (i, b) in buckets.iter().enumerate() {
        let y = 40 + i * ROW;
        let length = (b.visits as f64 / most * WIDTH as f64).max(1.0);
        // Lightness from 70 % (nothing is cropped) to 30 % (half or more).
        let lightness = 70.0 - 80.0 * b.crop_loss.clamp(0.0, 0.5);
        let left = left_over(b, batch_size);
        let last = if left == 0 { String::new() } else { format!(", last batch {left}") };
        let _ = writeln!(
            out,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{} x {}</text><rect x=\"{LEFT}\" y=\"{}\" width=\"{length:.1}\" height=\"{}\" \
             fill=\"hsl(210,60%,{lightness:.0}%)\"/><text x=\"{:.1}\" y=\"{}\" fill=\"#444444\">{}, crop {:.1} %{last}</text>",
            LEFT - 8,
            y + 12,
            b.size.0,
            b.size.1,
            y,
            ROW - 4,
            LEFT as f64 + length + 6.0,
            y + 12,
            b.visits,
            b.crop_loss * 100.0
        );
    }
    out.push_str("</svg>\n");
    out
}
