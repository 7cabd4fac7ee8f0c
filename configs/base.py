"""Every field with its default. The other configs are differences from this one; --config.a.b=value overrides either.

Fields that hold a call, such as 'shift(uniform(), 2.0)', may call the functions of one module of diffusion_jax (named
beside them) or any function by its dotted name.
"""
from ml_collections import ConfigDict


def get_config():
  config = ConfigDict()
  config.seed = 0  # of the parameters, the data order, the noise
  # Sizes of the axes data (devices that share a batch), fsdp (that share a batch and the state too) and tensor (that share
  # the channels); -1: what is left of the devices of the job, or of the slice that is planned for.
  config.mesh = 'data=-1'
  # Rules of runtime/sharding.py for parameters by regular expressions over their paths, the first that is found counts:
  # (('conv_1/kernel', 'tensor(-1) | fsdp()'), ('.*', 'fsdp()')); (): those of the network, method.SHARDING.
  config.sharding = ()

  # The mathematics (diffusion_jax/core)
  config.schedule = 'cosine()'  # schedules.py, betas.py: t -> (alpha, sigma); 'discrete(linear_betas(1000))'
  config.target = 'v()'  # targets.py: what the network predicts
  config.loss = 'regression()'  # 'regression(huber(0.1))', losses.py; 'hybrid()', 'bound(softmax(256))', bounds.py
  config.space = 'v()'  # targets.py: the space in which a regression is taken
  config.times = 'stratified()'  # times.py: the law of the training times
  config.weight = 'constant()'  # weights.py: w(logsnr) of a regression, stated for space = 'noise()'
  config.uncertainty = ''  # weights.py: 'uncertainty(128)' learns a weight of its own beside it; '': none
  config.solver = 'ddim()'  # solvers.py, singlestep.py, multistep.py, correctors.py: 'unipc(3)', 'churn(heun(), 40.0, 64)'
  config.grid = 'uniform(64)'  # grids.py: the times that sampling visits; 'restart(uniform(32))' rises on its way
  config.transform = 'clip(1.0)'  # guidance.py, constraints.py: 'guide(2.0) | clip(1.0)', applied from left to right

  # The network (diffusion_jax/networks)
  config.network = 'UNet(channels=32, multipliers=(1, 2), blocks=1, attention=(False, False))'

  # The data
  config.task = 'images'  # 'images', with or without labels; 'captions'
  config.data = ConfigDict()
  config.data.source = 'digits'  # 'digits' (scikit-learn; images), 'shapes' (drawn; captions), 'tfds', 'folder'
  config.data.name = ''  # tfds: the name of the set, 'cifar10'
  config.data.path = ''  # folder: the folder; tfds: the folder of prepared sets, '' for TFDS_DATA_DIR
  config.data.train = 'train'  # tfds: training split, 'train[:90%]'
  config.data.test = 'test'  # tfds: held-out split
  config.data.holdout = 100  # folder: images held out after a fixed shuffle; shapes: held-out pictures
  config.data.count = 20_000  # shapes: training pictures
  config.data.caption = 'text'  # captions: the column of metadata.csv, or the feature of a TFDS set, 'captions/text'
  config.data.size = (8, 8)  # pixels, height and width, to which images are brought
  config.data.resize = 'crop'  # 'crop' (the middle, to the aspect) then resize, 'stretch', 'none'
  config.data.channels = 1  # 1 grey, 3 RGB, 4 RGBA
  config.data.flip = False  # mirror left to right, every second time
  config.data.classes = -1  # -1: as many as the data have, 0: unconditional
  config.data.bad_files = 'stop'  # folder, a file that cannot be read: 'stop', or 'skip' and count it

  # The text of captions
  config.text = ConfigDict()
  config.text.encoder = 'CLIPText(width=128, layers=4, heads=4)'  # networks/text.py
  # The workdir of a trained run whose text encoder is taken as it is, its embeddings of the captions kept on disk; '': the
  # encoder is trained with the network.
  config.text.frozen = ''
  config.text.length = 16  # tokens of a text, its start and end counted
  config.text.long = 'cut'  # a text with more: 'cut', which is said, or 'refuse'
  config.text.tokenizer = ''  # a file of the tokenizers library; '': a byte-level BPE trained on the captions
  config.text.vocabulary = 512  # tokens that there are, at most

  # Conditions that training draws from the images themselves, beside labels and texts
  config.condition = ConfigDict()
  # An encoder of reference images, networks/vision.py, whose tokens are attended to beside the text's and as wide:
  # 'CLIPVision(width=64, layers=2, heads=4, patch=4)'; in training it sees a view of the image itself. '': none.
  config.condition.reference = ''
  config.condition.known = False  # the network sees which pixels are known, and them: it is trained to inpaint

  # Training
  config.train = ConfigDict()
  config.train.steps = 1000
  config.train.batch = 128  # examples a step, over all devices
  config.train.accumulate = 1  # parts of a batch that are taken one after the other, in as much less memory
  config.train.drop = 0.1  # probability that all conditions of an example are dropped
  config.train.drop_each = 0.0  # probability that one of them is dropped, for each on its own
  config.train.ema = (0.999,)  # decays of the moving averages of the parameters; the first is sampled by default
  config.train.nonfinite = 'stop'  # a loss or gradient that is not finite: 'stop', or 'skip' the step and count it
  config.train.nonfinite_most = 10  # with 'skip': more of such steps in a row than this stop the run
  config.optimizer = ConfigDict()
  config.optimizer.name = 'adamw'  # or 'muon', which learns more in a step, for the kernels of inner layers
  config.optimizer.rate = 1e-3  # after the warm-up
  config.optimizer.warmup = 100  # steps
  config.optimizer.decay = 'constant'  # 'constant', or 'cosine' to 0 at train.steps
  config.optimizer.b1 = 0.9  # of AdamW, as the next two
  config.optimizer.b2 = 0.999
  config.optimizer.eps = 1e-8
  config.optimizer.weight_decay = 0.0
  config.optimizer.clip = 1.0  # global norm of the gradient; 0: not clipped

  # What is kept and shown
  config.checkpoint = ConfigDict()
  config.checkpoint.every = 500  # steps
  config.checkpoint.keep = 2
  config.log = ConfigDict()
  config.log.every = 50  # steps between scalars
  config.log.samples = 0  # steps between sample sheets, 0: none before the end

  # After training, and --mode=sample
  config.sample = ConfigDict()
  config.sample.count = 100  # 0: no samples after training
  config.sample.batch = 100  # samples at once, over all devices
  config.sample.seed = 0  # sample i is the same for any count and batch
  config.sample.labels = ()  # classes to sample in turn; (): all
  config.sample.prompts = ()  # texts to sample in turn; (): the held-out captions
  config.sample.negative = ''  # a text to lead away from, where the transform guides; '': the null
  config.sample.ema = -1.0  # which of train.ema, 0.0: the parameters themselves, -1.0: the first

  # After training, and --mode=evaluate
  config.evaluate = ConfigDict()
  config.evaluate.count = 1000  # samples for each of the transforms; 0: no evaluation
  config.evaluate.batch = 250
  config.evaluate.transforms = ('clip(1.0)',)
  config.evaluate.bits = 0  # held-out images, and training images, whose bits per entry are measured; 0: none
  config.evaluate.trace = 'hutchinson(1)'  # likelihood.py: of the Jacobian, 'exact()' for a few hundred entries
  config.evaluate.integrator = 'fixed(50)'  # ode.py: of the probability-flow ODE, 'adaptive(1e-4, 1e-4)'
  config.evaluate.reference = 5000  # most training images that scores use

  # --mode=benchmark
  config.benchmark = ConfigDict()
  config.benchmark.seconds = 2.0  # of a timed block, about
  config.benchmark.repeats = 7  # blocks, of which the median counts
  config.benchmark.real = True  # the task's own input beside synthetic input; False: the data are not read
  config.lock()
  return config
