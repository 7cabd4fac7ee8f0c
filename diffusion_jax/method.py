"""config -> Method: the one place where the mathematics meets the networks."""
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from jax import numpy as jnp
from jaxtyping import PyTree
from ml_collections import ConfigDict

from diffusion_jax.build import build, rows
from diffusion_jax.core import (
  betas,
  bounds,
  constraints,
  correctors,
  grids,
  guidance,
  likelihood,
  losses,
  multistep,
  ode,
  schedules,
  singlestep,
  solvers,
  targets,
  times,
  types,
  weights,
)
from diffusion_jax.core.losses import Distance, Loss
from diffusion_jax.core.processes import Gaussian
from diffusion_jax.core.solvers import Solver
from diffusion_jax.core.targets import Target
from diffusion_jax.core.times import Adaptive, Times
from diffusion_jax.core.types import Denoiser, Draw, Learned, Network, Schedule, Transform
from diffusion_jax.core.weights import Weight
from diffusion_jax.networks import dit, embed, text, unet, vision
from diffusion_jax.tasks.task import Task

NETWORKS = {'UNet': unet.UNet, 'DiT': dit.DiT}
SHARDING = {'UNet': (('(conv_1|norm_2|time)/', 'tensor(-1) | fsdp()'),  # of a residual block: the first convolution makes
                     ('conv_2/kernel', 'tensor(-2) | fsdp()'),  # a part of the channels, which the second one sums over
                     ('.*', 'fsdp()')),
            'DiT': (('(query|key|value|mlp_in)/kernel', 'tensor(-1) | fsdp()'),  # whole heads, a part of the perceptron,
                    ('(query|key|value|mlp_in)/bias', 'tensor(-1)'),
                    ('(mix|mlp_out)/kernel', 'tensor(-2) | fsdp()'),  # which these sum over
                    ('.*', 'fsdp()'))}
SCHEDULES = {**rows(schedules, Schedule), **rows(schedules, Learned), **rows(betas, Schedule), **rows(betas, betas.Betas)}
SOLVERS = {**rows(solvers, Solver), **rows(singlestep, Solver), **rows(multistep, Solver), **rows(correctors, Solver)}
GRIDS = rows(grids, grids.Grid)
TRANSFORMS = {**rows(guidance, Transform), **rows(constraints, Transform)}
TIMES = {**rows(times, Times), **rows(times, Adaptive)}
KEY = jax.eval_shape(lambda: jax.random.key(0))  # the shape of a key


class Method(NamedTuple):
  """What is trained. `params` are {'params': the network's} with an entry beside it for every learned part of the
  mathematics; `extra` is what training keeps and no gradient moves."""
  init: Callable  # key -> (params, extra)
  loss: Callable  # (params, extra, draw, batch) -> (losses [B], news, metrics), news being arrays [B, ...] by name
  update: Callable  # (extra, news of a global batch in the order of its index) -> extra
  denoiser: Callable[[PyTree, PyTree], Denoiser]  # (params, extra) -> denoiser
  process: Callable[[PyTree], Gaussian]  # params -> process
  times: Callable[[PyTree], Times]  # extra -> the law of the training times


class Sampling(NamedTuple):
  """How a method is sampled."""
  solver: Solver
  grid: np.ndarray
  transform: Transform


def make_method(config: ConfigDict, task: Task) -> Method:
  """The method of a config for a task. Raises ValueError, before anything is compiled, where a field is illegal."""
  for name in ('drop', 'drop_each'):
    if not 0 <= config.train[name] <= 1:
      raise ValueError(f'config.train.{name} is {config.train[name]}; a probability between 0 and 1 is legal.')
  schedule, law = _schedule(config), _build(config, 'times', TIMES)
  uncertainty = _build(config, 'uncertainty', rows(weights, Learned)) if config.uncertainty else None
  parts = {'schedule': schedule, 'uncertainty': uncertainty}
  learned = {name: part for name, part in parts.items() if isinstance(part, Learned)}
  adaptive, drops = isinstance(law, Adaptive), config.train.drop > 0 or config.train.drop_each > 0
  make_loss, net = _make_loss(config), make_network(config, task)
  begin, apply = jax.jit(net.init), jax.jit(net.apply)  # each is traced once for all who call it with the same shapes
  example = _example(task)
  jax.eval_shape(begin, KEY, *example)  # the network's fields contradict neither each other nor the task's shape
  first = Gaussian(_first(schedule)), _as_uniform(law.times(law.init())) if adaptive else law
  _check_times(config, *first)
  make_loss(*first)

  def init(key):
    mathematics = {name: part.init(jax.random.fold_in(key, i)) for i, (name, part) in enumerate(learned.items())}
    return {**begin(key, *example), **mathematics}, {'times': law.init()} if adaptive else {}

  def network(params, dropout_keys=None) -> Network:
    def call(x, feature, cond):
      if 'drop' in (cond or {}) and not (drops and task.null):
        raise ValueError('Guidance needs a network that was trained with dropped conditions: this one has the conditions '
                         f'{sorted(task.null or {})} and config.train.drop={config.train.drop}. Leave guide(...) out of '
                         'the transform, or train with config.train.drop=0.1.')
      return apply({'params': params['params']}, x, feature, _with_nulls(cond, task.null), dropout_keys)
    return call

  process = lambda params: Gaussian(schedule.bind(params['schedule']) if 'schedule' in learned else schedule)
  chosen = lambda extra: law.times(extra['times']) if adaptive else law

  def training_loss(params, extra, draw: Draw, batch):
    x0, cond = task.encode(batch)
    cond = task.drawn(draw.part(types.VIEW).keys, x0, cond)
    if cond and drops:
      cond = {**cond, 'drop': _drops(config, sorted(cond), draw.part(types.DROP).keys)}
    drawn = chosen(extra)
    def values_of(params):
      loss = make_loss(process(params), _as_uniform(drawn) if adaptive else drawn)
      return loss(network(params, draw.part(types.DROPOUT).keys), draw, x0, cond, None)
    values = _train_schedule(values_of, params) if 'schedule' in learned else values_of(params)
    level = process(params).level(drawn.sample(process(params), draw.part(types.TIMES)))  # the same draw as in the loss
    news, metrics = {}, {}
    if adaptive:
      news = {'t': level.t, 'losses': jax.lax.stop_gradient(values)}
      values = values / drawn.density(process(params), level.t)
    if uncertainty:
      metrics = {'plain_loss': values.mean()}
      log_variance = uncertainty.bind(params['uncertainty'])(level.logsnr)
      values = values * jnp.exp(-log_variance) + log_variance
    return values, news, metrics

  def update(extra, news):
    return {'times': law.update(extra['times'], news['t'], news['losses'])} if adaptive else extra

  denoiser = lambda params, extra: targets.denoiser(process(params), _target(config), network(params))
  return Method(init, training_loss, update, denoiser, process, chosen)


def make_network(config: ConfigDict, task: Task) -> nn.Module:
  """The backbone of config.network with an embedder for every condition of the task."""
  backbone = build(config.network, NETWORKS)
  channels = task.shape[-1] * (2 if _target(config).learns_variance else 1)
  backbone = backbone.clone(out_channels=channels, axes=len(task.shape) - 1)
  size, dtype = backbone.vector_size, backbone.param_dtype
  make = {'label': lambda: embed.Label(task.classes, size, dtype),
          'text': lambda: (embed.FrozenText(size, dtype) if config.text.frozen else
                           embed.Text(make_encoder(config), size, dtype)),
          'reference': lambda: embed.Reference(make_reference(config), size, dtype),
          'known': embed.Known}
  return embed.Conditional(backbone, {name: make[name]() for name in task.null or {}})


def make_encoder(config: ConfigDict) -> nn.Module:
  """The text encoder of config.text.encoder, which takes as many tokens as config.text says."""
  return _build(config, 'text.encoder', text.encoders(config.text.vocabulary, config.text.length))


def make_reference(config: ConfigDict) -> nn.Module:
  """The encoder of reference images of config.condition.reference."""
  return _build(config, 'condition.reference', {'CLIPVision': vision.CLIPVision})


def _drops(config: ConfigDict, names: list[str], keys: jax.Array) -> dict[str, jax.Array]:
  """Which conditions of which examples training drops: all of an example's with probability config.train.drop, and each
  on its own with config.train.drop_each."""
  chance = lambda keys, probability: jax.vmap(lambda key: jax.random.bernoulli(key, probability))(keys)
  every = chance(keys, config.train.drop)
  return {name: every | chance(types.fold(keys, i), config.train.drop_each) for i, name in enumerate(names)}


def _with_nulls(cond: types.Cond, null: types.Cond) -> types.Cond:
  """The conditions that a network sees, where those marked in cond['drop'] are the null, one example of each."""
  cond = cond or {}
  def choose(lost, value, none):
    return jnp.where(types.spread(lost, value), jnp.asarray(none, value.dtype), value)
  drop = cond.get('drop', {})
  seen = {name: value for name, value in cond.items() if name not in types.ASIDE}
  return {**seen, **{name: jax.tree.map(partial(choose, lost), seen[name], null[name]) for name, lost in drop.items()}}


def default_sharding(config: ConfigDict) -> tuple[tuple[str, str], ...]:
  """The rules of config.sharding for the backbone of a config, where it gives none."""
  return SHARDING.get(config.network.partition('(')[0].strip(), (('.*', 'fsdp()'),))


def make_sampling(config: ConfigDict, transform: str) -> Sampling:
  """The solver and grid of a config with a transform. Raises ValueError where the grid touches a singular point."""
  schedule = _schedule(config)
  grid = _build(config, 'grid', GRIDS)
  times = np.asarray(grid(_no_schedule if isinstance(schedule, Learned) else schedule))
  targets.check_grid(Gaussian(_first(schedule)), _target(config), times, f'config.target {config.target!r}')
  return Sampling(_build(config, 'solver', SOLVERS), times,
                  build(transform, TRANSFORMS, join=guidance.chain))


def make_likelihood(config: ConfigDict) -> tuple[likelihood.Trace, ode.Integrator]:
  """How a config measures bits: the trace and the integrator."""
  return (_build(config, 'evaluate.trace', rows(likelihood, likelihood.Trace)),
          _build(config, 'evaluate.integrator', rows(ode, ode.Integrator)))


def _schedule(config: ConfigDict) -> Schedule | Learned:
  """The schedule, checked to be a way from data to noise; a learned one needs the loss that it can be learned by."""
  schedule = _build(config, 'schedule', SCHEDULES)
  if isinstance(schedule, Learned) and set(schedule.init(jax.random.key(0))) != {'ends', 'inner'}:
    raise ValueError(f"config.schedule {config.schedule!r} is learned; its parameters must be {{'ends': .., 'inner': ..}}.")
  schedules.check(_first(schedule), f'config.schedule {config.schedule!r}')
  if isinstance(schedule, Learned) and _objective(config) != 'bound':
    raise ValueError(f'config.schedule {config.schedule!r} is learned by the bound, whose mean it does not change; '
                     f"config.loss is {config.loss!r}. Take config.loss='bound(softmax(256), high=None)'.")
  return schedule


def _first(schedule: Schedule | Learned) -> Schedule:
  """The schedule before training."""
  return schedule.bind(schedule.init(jax.random.key(0))) if isinstance(schedule, Learned) else schedule


def _no_schedule(t):
  raise ValueError("config.grid asks for the logsnr of a schedule that is learned; grids in t, such as 'uniform(64)', are "
                   'legal here.')


def _target(config: ConfigDict) -> Target:
  return _build(config, 'target', rows(targets, Target))


def _objective(config: ConfigDict) -> str:
  return config.loss.partition('(')[0].strip()


def _make_loss(config: ConfigDict) -> Callable[[Gaussian, Times], Loss]:
  """(process, times) -> the loss of config.loss."""
  target, space = _target(config), _build(config, 'space', rows(targets, Target))
  weight = _build(config, 'weight', rows(weights, Weight))
  if _objective(config) == 'bound' and (config.weight not in ('constant()', 'constant') or config.uncertainty):
    raise ValueError(f"config.loss {config.loss!r} has a weight of its own; config.weight is {config.weight!r} and "
                     f"config.uncertainty {config.uncertainty!r}. Take 'constant()' and ''.")
  def make(process, law):
    squares = (process, target, law, weight, space)
    names = {'regression': partial(losses.regression, *squares), 'hybrid': partial(bounds.hybrid, *squares),
             'bound': partial(bounds.bound, process, target, law)}
    return _build(config, 'loss', {**names, **rows(losses, Distance), **rows(bounds, bounds.Decoder)})
  return make


def _check_times(config: ConfigDict, process: Gaussian, law: Times) -> None:
  """Raise ValueError where the law of times cannot be had on this schedule."""
  try:
    jax.eval_shape(lambda key: law.sample(process, Draw(key, jnp.arange(2), 2)), KEY)
  except ValueError as error:
    raise ValueError(f'config.times {config.times!r}: {error}') from error


def _as_uniform(law: Times) -> Times:
  """The law with the density of uniform times: what an adaptive law draws more often is weighted down after the loss."""
  return law._replace(density=lambda process, t: jnp.ones_like(t))


def _train_schedule(values_of: Callable, params: PyTree) -> jax.Array:
  """The losses, with the gradient of VDM (arXiv:2107.00630, app. I.2): the inner parameters of the schedule, which do not
  move the mean of the bound, get that of its square, and so make its variance least; all others get its own."""
  still, schedule = jax.lax.stop_gradient(params), params['schedule']
  values = values_of({**params, 'schedule': {**schedule, 'inner': still['schedule']['inner']}})
  squares = values_of({**still, 'schedule': {**still['schedule'], 'inner': schedule['inner']}})**2
  return values + squares - jax.lax.stop_gradient(squares)


def _build(config: ConfigDict, field: str, names: dict[str, Callable]) -> Any:
  group, _, name = field.rpartition('.')
  try:
    return build((config[group] if group else config)[name], names)
  except ValueError as error:
    raise ValueError(f'config.{field}: {error}') from error


def _example(task: Task) -> tuple[np.ndarray, np.ndarray, dict | None]:
  """What the network takes, (x, the time feature, cond), of one example of zeros, for shapes."""
  cond = jax.tree.map(lambda leaf: np.zeros((1, *leaf.shape), leaf.dtype), task.null)
  return np.zeros((1, *task.shape), np.float32), np.zeros(1, np.float32), cond
