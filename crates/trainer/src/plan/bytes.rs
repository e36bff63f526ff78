//! Bytes of what a network and its kernels hold.

use sdxl::layers::{Leaf, ModuleTree};

use crate::config::RunConfig;

/// What the CPU's convolutions and attention keep from call to call.
pub(super) fn kernel_buffers(unet: &ModuleTree, keys: usize, threads: usize) -> u64 {
    let channels = |leaf: &Leaf| match leaf {
        Leaf::Conv2d(l) if l.weight.dims().last() == Some(&3) => l.weight.dims()[..2].iter().copied().max(),
        _ => None,
    };
    let widest = unet.nodes.iter().filter_map(|node| channels(&node.leaf)).max().unwrap_or(0);
    (ops::conv2d_buffers(widest, threads) + ops::attention_buffers(keys, threads)) as u64
}

/// Threads that compute.
pub(super) fn threads(config: &RunConfig) -> usize {
    config.train.threads.unwrap_or_else(rayon::current_num_threads)
}

/// Bytes of a network's frozen tensors.
pub(super) fn weight_bytes(tree: &ModuleTree) -> u64 {
    let bytes = |t: &candle_core::Tensor| (t.elem_count() * t.dtype().size_in_bytes()) as u64;
    let of = |leaf: &Leaf| match leaf {
        Leaf::Linear(l) => l.bias.as_ref().map_or(0, bytes),
        Leaf::Conv2d(l) => l.bias.as_ref().map_or(0, bytes),
        Leaf::Norm(l) => bytes(&l.weight) + bytes(&l.bias),
        Leaf::Other => 0,
    };
    layer_bytes(tree) + tree.nodes.iter().map(|n| of(&n.leaf)).sum::<u64>()
}

/// Bytes of the weights of a network's linear layers and convolutions.
pub(super) fn layer_bytes(tree: &ModuleTree) -> u64 {
    let bytes = |w: &ops::Weight| (w.elem_count() * w.dtype().size_in_bytes()) as u64;
    let of = |leaf: &Leaf| match leaf {
        Leaf::Linear(l) => bytes(&l.weight),
        Leaf::Conv2d(l) => bytes(&l.weight),
        Leaf::Norm(_) | Leaf::Other => 0,
    };
    tree.nodes.iter().map(|n| of(&n.leaf)).sum()
}
