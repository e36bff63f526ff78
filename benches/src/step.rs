//! One training step of a UNet under LoKr: forward, backward, Lion8bit. Context and added condition are given, as on the
//! PyTorch side, so text encoders and data take no part.

use candle_core::{Device, Shape, Tensor};
use lokr::functional::Path;
use lokr::{LokrNetwork, NetworkConfig, Preset, Trees};
use ops::Value;
use optim::{Hyper, Optimizer, OptimizerKind};
use random::{Purpose, Stream};
use sdxl::GradientCheckpointing;
use sdxl::unet::UNet;
use trainer::step::{Trained, update};

use crate::Result;
use crate::model::Config;

/// LoKr on every layer of the UNet's blocks; embeddings, first and last convolution stay as they are.
const PRESET: &str = r#"
enable_conv = true
unet_target_module = ["Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"]
unet_target_name = []
text_encoder_target_module = []
text_encoder_target_name = []
"#;

/// Tokens of the text context.
const TOKENS: usize = 77;

/// What is measured.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// Model.
    pub config: Config,
    /// Height and width of the latents.
    pub latent: usize,
    /// Samples.
    pub batch: usize,
    /// Which activations are computed again in the backward pass.
    pub checkpointing: GradientCheckpointing,
    /// Forces the adapter's path in every layer.
    pub path: Option<Path>,
    /// Whether products are rounded to bf16, where the CPU multiplies it.
    pub bf16: bool,
}

/// A model with its adapter, optimizer and one batch.
pub struct Step {
    unet: UNet,
    network: LokrNetwork,
    trained: Vec<Trained>,
    optimizer: Optimizer,
    latents: Value,
    noise: Tensor,
    timesteps: Tensor,
    context: Value,
    vector: Value,
    checkpointing: GradientCheckpointing,
    bf16: bool,
}

impl Step {
    /// Loads the model and attaches a LoKr of full matrices, factor 8.
    ///
    /// # Errors
    /// If the model cannot be written or read.
    pub fn new(setup: &Setup) -> Result<Self> {
        let unet = setup.config.unet()?;
        let preset = Preset::parse("the bench's preset", PRESET)?;
        let config = NetworkConfig { factor: 8, full_matrix: true, path: setup.path, ..NetworkConfig::new(preset) };
        let network = LokrNetwork::create(&config, Trees { unet: Some(&unet.tree), ..Trees::default() })?;
        let trained: Vec<Trained> = network.parameters().into_iter().map(|(group, parameter)| Trained { group, parameter }).collect();
        let sizes: Vec<usize> = trained.iter().map(|t| t.parameter.tensor().elem_count()).collect();
        let hyper = Hyper { betas: (0.9, 0.95), weight_decay: 0.1, eps: 0.0 };
        let optimizer = Optimizer::new(OptimizerKind::Lion8bit, hyper, &sizes);

        let (n, side) = (setup.batch, setup.latent);
        let normal = |index: u64, shape: &[usize]| {
            let values = Stream::new(0, Purpose::Noise, index, 0).normal(shape.iter().product());
            Tensor::from_vec(values, shape, &Device::Cpu)
        };
        let mut stream = Stream::new(0, Purpose::Timestep, 0, 0);
        let timesteps: Vec<f32> = (0..n).map(|_| stream.below(1000) as f32).collect();
        Ok(Self {
            latents: Value::constant(normal(0, &[n, 4, side, side])?),
            noise: normal(1, &[n, 4, side, side])?,
            timesteps: Tensor::from_vec(timesteps, n, &Device::Cpu)?,
            context: Value::constant(normal(2, &[n, TOKENS, unet.config.context_dim])?),
            vector: Value::constant(normal(3, &[n, unet.config.adm_dim])?),
            unet,
            network,
            trained,
            optimizer,
            checkpointing: setup.checkpointing,
            bf16: setup.bf16,
        })
    }

    /// One step; gives the loss, the mean square of prediction minus noise.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn run(&mut self) -> Result<f64> {
        ops::awake(|| ops::with_bf16(self.bf16, || self.run_awake()))
    }

    fn run_awake(&mut self) -> Result<f64> {
        let prediction = self.unet.forward(&self.latents, &self.timesteps, &self.context, &self.vector, self.checkpointing)?;
        let error = (prediction.tensor() - &self.noise)?;
        let loss = error.sqr()?.mean_all()?.to_scalar::<f32>()?;
        let gradient = (&error * (2.0 / error.elem_count() as f64))?;
        ops::backward(vec![(prediction, gradient)])?;
        // No clipping: the other side has none.
        update(&self.trained, &mut self.optimizer, (0.0, 1.0), 0.0, |_| 2e-5)?;
        Ok(loss.into())
    }

    /// Frozen numbers.
    pub fn base_parameters(&self) -> usize {
        use sdxl::layers::Leaf;
        let count = |weight: &Shape, bias: Option<&Tensor>| weight.elem_count() + bias.map_or(0, |b| b.elem_count());
        let leaves = self.unet.tree.nodes.iter().map(|node| match &node.leaf {
            Leaf::Linear(layer) => count(&layer.weight, layer.bias.as_ref()),
            Leaf::Conv2d(layer) => count(&layer.weight, layer.bias.as_ref()),
            Leaf::Norm(layer) => count(layer.weight.shape(), Some(&layer.bias)),
            Leaf::Other => 0,
        });
        leaves.sum()
    }

    /// Trained numbers.
    pub fn lokr_parameters(&self) -> usize {
        self.network.summary().iter().map(|s| s.parameters).sum()
    }
}
