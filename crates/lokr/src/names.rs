//! The names under which programs save an adapter's modules, for reading only: lokr writes kohya's. LyCORIS and sd-scripts
//! write SGM paths after `lora_unet_`; diffusers' paths stand after `lora_unet_`, `unet.` or (LyCORIS's own wrapper, as in
//! SimpleTuner and ai-toolkit) `lycoris_`; `diffusion_model.` is ComfyUI's. peft's files keep alpha elsewhere: not read.

use crate::group::ParameterGroup;

/// Every known name of the module at `path`, kohya's first.
pub(crate) fn aliases(group: ParameterGroup, path: &str) -> Vec<String> {
    let mut names = vec![group.kohya_name(path)];
    match group {
        ParameterGroup::TextEncoder1 => names.push(format!("text_encoder.{path}")),
        ParameterGroup::TextEncoder2 => names.push(format!("text_encoder_2.{path}")),
        ParameterGroup::Unet => {
            names.push(format!("diffusion_model.{path}"));
            if let Some(diffusers) = unet_to_diffusers(path) {
                let flat = diffusers.replace('.', "_");
                names.extend([format!("unet.{diffusers}"), format!("lora_unet_{flat}"), format!("lycoris_{flat}")]);
            }
        }
    }
    names
}

/// diffusers' path of a UNet module. Blocks are numbered through in the SGM layout, three to a level.
fn unet_to_diffusers(path: &str) -> Option<String> {
    let outer = [
        ("time_embed.0", "time_embedding.linear_1"),
        ("time_embed.2", "time_embedding.linear_2"),
        ("label_emb.0.0", "add_embedding.linear_1"),
        ("label_emb.0.2", "add_embedding.linear_2"),
        ("input_blocks.0.0", "conv_in"),
        ("out.0", "conv_norm_out"),
        ("out.2", "conv_out"),
    ];
    if let Some((_, name)) = outer.iter().find(|(sgm, _)| *sgm == path) {
        return Some(name.to_string());
    }
    let mut parts = path.splitn(4, '.');
    let mut next = || parts.next();
    let (side, first, second) = (next()?, next()?.parse::<usize>().ok()?, next());
    if side == "middle_block" {
        let rest = path.splitn(3, '.').nth(2)?;
        return match first {
            0 | 2 => Some(format!("mid_block.resnets.{}.{}", first / 2, resnet(rest)?)),
            1 => Some(format!("mid_block.attentions.0.{rest}")),
            _ => None,
        };
    }
    let (kind, rest) = (second?.parse::<usize>().ok()?, next()?);
    let (blocks, level, place) = match side {
        "input_blocks" if first > 0 => ("down_blocks", (first - 1) / 3, (first - 1) % 3),
        "output_blocks" => ("up_blocks", first / 3, first % 3),
        _ => return None,
    };
    match (blocks, kind, rest) {
        ("down_blocks", 0, "op") => Some(format!("down_blocks.{level}.downsamplers.0.conv")),
        ("up_blocks", 2, "conv") => Some(format!("up_blocks.{level}.upsamplers.0.conv")),
        (_, 0, _) => Some(format!("{blocks}.{level}.resnets.{place}.{}", resnet(rest)?)),
        (_, 1, _) => Some(format!("{blocks}.{level}.attentions.{place}.{rest}")),
        _ => None,
    }
}

fn resnet(inner: &str) -> Option<&'static str> {
    Some(match inner {
        "in_layers.0" => "norm1",
        "in_layers.2" => "conv1",
        "emb_layers.1" => "time_emb_proj",
        "out_layers.0" => "norm2",
        "out_layers.3" => "conv2",
        "skip_connection" => "conv_shortcut",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_sgm_and_diffusers_names() {
        for (sgm, diffusers) in [
            ("input_blocks.1.0.in_layers.2", Some("down_blocks.0.resnets.0.conv1")),
            ("input_blocks.3.0.op", Some("down_blocks.0.downsamplers.0.conv")),
            ("input_blocks.4.0.skip_connection", Some("down_blocks.1.resnets.0.conv_shortcut")),
            ("input_blocks.8.1.proj_in", Some("down_blocks.2.attentions.1.proj_in")),
            ("middle_block.0.emb_layers.1", Some("mid_block.resnets.0.time_emb_proj")),
            ("middle_block.1.transformer_blocks.9.attn1.to_out.0", Some("mid_block.attentions.0.transformer_blocks.9.attn1.to_out.0")),
            ("middle_block.2.out_layers.3", Some("mid_block.resnets.1.conv2")),
            ("output_blocks.2.2.conv", Some("up_blocks.0.upsamplers.0.conv")),
            ("output_blocks.3.1.transformer_blocks.0.ff.net.0.proj", Some("up_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj")),
            ("output_blocks.8.0.in_layers.0", Some("up_blocks.2.resnets.2.norm1")),
            ("input_blocks.0.0", Some("conv_in")),
            ("out.2", Some("conv_out")),
            ("input_blocks.4", None),
            ("output_blocks.2.1", None),
            ("nothing", None),
        ] {
            assert_eq!(unet_to_diffusers(sgm).as_deref(), diffusers, "{sgm}");
        }
    }
}
