"""Guidance: functions denoiser -> denoiser that push the estimate of x0 towards a condition.

Each row is a rule for x0 from the estimates of one or more branches. Projections and norms are an example's, over all
its entries. What acts `during` (low, high) acts at t in [low, high], and elsewhere is the denoiser that it was given, the
only one computed there if t is one number; if t is an array, all is computed and chosen entry by entry. The variance and
aux of an estimate are those of the denoiser. Rows whose formula has alpha and sigma are for a Gaussian process.
"""
import math
from collections.abc import Callable

import jax
from jax import numpy as jnp
from jaxtyping import Array, PyTree

from diffusion_jax.core.types import ASIDE, Cond, Denoiser, Estimate, Level, Transform, combine, dot, spread


def guide(weight: float, during: tuple[float, float] = (0.0, 1.0), negative: dict | None = None) -> Transform:
  """Classifier-free guidance: x0 = x0_null + weight (x0_cond - x0_null) while t is in `during` (arXiv:2207.12598, eq. 6).

  weight 1 is the conditional denoiser itself, 0 the unconditional one; the paper's w is weight - 1. `negative`, such as
  {'label': 3}, by default cond's own entry 'negative' if it has one, replaces those entries of cond in the second branch,
  which then is not the null but what to avoid. Outside the interval (arXiv:2404.07724, sec. 3) only the conditional
  branch is computed. Raises ValueError where weight is not finite, `during` no interval in [0, 1], or an entry of
  `negative` is none of cond.
  """
  rule = lambda x, level, given, null: extrapolate(weight, given, null)
  return _between('guide', rule, weight, during, negative)


def rescale(weight: float, phi: float = 0.7, during: tuple[float, float] = (0.0, 1.0),
            negative: dict | None = None) -> Transform:
  """`guide`, with its contrast brought back: phi x0 std(x0_cond) / std(x0) + (1 - phi) x0 (arXiv:2305.08891, eq. 15-16).

  The standard deviation is over all entries of an example, leaf by leaf; here of x0, whatever the network predicts.
  Raises ValueError as `guide` does and where phi is not in [0, 1].
  """
  if not 0 <= phi <= 1:
    raise ValueError(f'rescale needs 0 <= phi <= 1; got {phi}.')
  def one(given, guided):
    deviation, target = (jnp.std(leaf.reshape(len(leaf), -1), 1) for leaf in (guided, given))
    factor = ratio(target, deviation, 1.0)
    return spread(phi * factor + 1 - phi, guided) * guided
  rule = lambda x, level, given, null: jax.tree.map(one, given, extrapolate(weight, given, null))
  return _between('rescale', rule, weight, during, negative)


def cfg_zero(weight: float, still: float = 0.0, during: tuple[float, float] = (0.0, 1.0),
             negative: dict | None = None) -> Transform:
  """CFG-Zero*: v = s v_null + weight (v_cond - s v_null), s = <v_cond, v_null> / |v_null|^2 (arXiv:2503.18886).

  v is the velocity noise - x0 of the flow path. x / (alpha + sigma) lies on that path at sigma / (alpha + sigma), whatever
  the schedule, so this serves all of a Gaussian. While t > 1 - still the velocity is 0 (the paper's zero-init), that is,
  x0 = x / (alpha + sigma). Raises ValueError as `guide` does and where still is not in [0, 1).
  """
  if not 0 <= still < 1:
    raise ValueError(f'cfg_zero needs 0 <= still < 1; got {still}.')
  if still and during[1] <= 1 - still:
    raise ValueError(f'cfg_zero stands still at t > {1 - still:g}, where during={during} lets nothing act: raise its end.')
  def rule(x, level, given, null):
    on_path = combine((1 / (level.alpha + level.sigma), x))
    to_given, to_null = (combine((1.0, on_path), (-1.0, x0)) for x0 in (given, null))  # velocities times the flow's time
    nearest = combine((ratio(dot(to_given, to_null), dot(to_null, to_null), 1.0), to_null))
    moves = jnp.where(level.t > 1 - still, 0.0, 1.0)
    return combine((1.0, on_path), (-moves, extrapolate(weight, to_given, nearest)))
  return _between('cfg_zero', rule, weight, during, negative, inert=weight == 1 and still == 0)


def apg(weight: float, parallel: float = 0.0, radius: float = math.inf, during: tuple[float, float] = (0.0, 1.0),
        negative: dict | None = None) -> Transform:
  """Adaptive projected guidance: x0_cond + (weight - 1) (d_orthogonal + parallel d_parallel) (arXiv:2410.02416).

  d = x0_cond - x0_null, shortened to the norm `radius` where it is longer, is split into what is parallel to x0_cond, which
  saturates, and the rest. The paper's momentum needs a memory between calls, which a denoiser has not. parallel=1 with
  radius=inf is guide(weight). Raises ValueError as `guide` does, where parallel is not finite and where radius <= 0.
  """
  _check_finite('apg', parallel=parallel)
  if not radius > 0:
    raise ValueError(f'apg needs radius > 0; got {radius}.')
  def rule(x, level, given, null):
    change = combine((1.0, given), (-1.0, null))
    if radius < math.inf:
      change = combine((jnp.minimum(1.0, ratio(radius, jnp.sqrt(dot(change, change)), 1.0)), change))
    along = component(change, given)
    return combine((1.0, given), (weight - 1, change), ((weight - 1) * (parallel - 1), along))
  return _between('apg', rule, weight, during, negative)


def perpendicular(weight: float, negative: dict | None = None, negative_weight: float = 1.0,
                  during: tuple[float, float] = (0.0, 1.0)) -> Transform:
  """Perp-Neg: x0 = x0_null + weight (d - negative_weight (n - its component along d)) (arXiv:2304.04968).

  d = x0_cond - x0_null and n = x0_negative - x0_null, where `negative` replaces entries of cond as in `guide`; so what the
  two conditions share is kept. Three branches, one batched call. Raises ValueError as `guide` does, and where neither
  it nor cond has a negative.
  """
  _check_finite('perpendicular', weight=weight, negative_weight=negative_weight)
  def rule(x, level, given, null, avoided):
    change, away = (combine((1.0, x0), (-1.0, null)) for x0 in (given, avoided))
    rest = combine((1.0, away), (-1.0, component(away, change)))
    return combine((1.0, null), (weight, change), (-weight * negative_weight, rest))
  def others(x, cond):
    avoided = negative or (cond or {}).get('negative')
    if not avoided:
      raise ValueError("perpendicular needs what to avoid: negative={'label': 3}, or an entry 'negative' of cond.")
    return [dropped(x, cond), replaced(cond, avoided)]
  return _during('perpendicular', during, _branched(rule, others))


def blend(share: float | None = None, towards: dict | None = None) -> Transform:
  """Between two conditions: x0 = (1 - share) x0_cond + share x0_towards, where `towards` replaces entries of cond.

  The conjunction of arXiv:2206.01714 with weights that sum to 1: the denoiser of the law in proportion to p(xt | cond)^(1 -
  share) p(xt | towards)^share, which is not the noised law of the same mixture of data (arXiv:2302.11552). Without
  arguments both are cond's own, in its entry 'towards', a share for each example; `guide` after it then leads the blend
  away from the null or the negative alone. Two branches, one batched call. Raises ValueError where share is not finite,
  where one of the two is given without the other, and where neither the row nor cond has them.
  """
  if (share is None) != (towards is None):
    raise ValueError(f'blend needs both share and towards, or neither; got {share} and {towards}.')
  own = share is None
  _check_finite('blend', share=0.0 if own else share)
  def both(denoise, x, level, cond):
    if own and 'towards' not in (cond or {}):
      raise ValueError("blend needs where to go: blend(0.5, {'label': 3}), or an entry 'towards' of cond.")
    far, entries = cond['towards'] if own else (share, towards)
    conds = [cond, replaced(cond, entries)]
    given, other = branches(denoise, x, level, conds, used='towards' if own else None)
    return given, combine((1 - far, widened(given.x0)), (far, widened(other.x0)))
  return _during('blend', (0.0, 1.0), both, inert=share == 0)


def autoguide(weight: float, weak: Denoiser, during: tuple[float, float] = (0.0, 1.0)) -> Transform:
  """Guidance by a weaker version of the denoiser: x0 = x0_weak + weight (x0 - x0_weak) (arXiv:2406.02507, sec. 3).

  `weak` is smaller, or less trained, and is given the same condition. weight 1 is the denoiser itself. Raises ValueError
  where weight is not finite or `during` no interval in [0, 1].
  """
  _check_finite('autoguide', weight=weight)
  def both(denoise, x, level, cond):
    given = denoise(x, level, cond)
    return given, extrapolate(weight, widened(given.x0), widened(weak(x, level, cond).x0))
  return _during('autoguide', during, both, inert=weight == 1)


def classifier(log_prob: Callable, scale: float = 1.0, during: tuple[float, float] = (0.0, 1.0)) -> Transform:
  """Classifier guidance: the score with scale grad log p(y | xt) added (arXiv:2105.05233, alg. 1-2).

  x0 + scale sigma^2 / alpha grad_xt log_prob(xt, level, cond), where log_prob gives nats, [B]. Nothing is added where
  alpha = 0: the factor has no value there, so a grid that is to have all of the push begins below. Raises ValueError where
  scale is not finite, `during` no interval in [0, 1], or log_prob not one number an example.
  """
  _check_finite('classifier', scale=scale)
  def both(denoise, x, level, cond):
    slope = jax.grad(lambda x: _total('log_prob', log_prob(x, level, cond), x))(x)
    given = denoise(x, level, cond)
    return given, add_score(widened(given.x0), slope, level, scale)
  return _during('classifier', during, both, inert=scale == 0)


def energy(function: Callable, scale: float = 1.0, during: tuple[float, float] = (0.0, 1.0)) -> Transform:
  """Guidance by an energy of the data: the score with -scale grad function(x0hat(xt)) added (arXiv:2303.09833; 2302.07121).

  x0hat - scale sigma^2 / alpha grad_xt function(x0hat(xt)), where function(x0) gives nats, [B], and the gradient goes
  through the denoiser: one call with its derivative. For Gaussian data and a linear function this is exact: samples have
  the law p(x0) exp(-scale function(x0)). Otherwise E[exp(-function) | xt] is taken to be that at the mean. alpha = 0 and
  what it raises are as in `classifier`.
  """
  _check_finite('energy', scale=scale)
  def both(denoise, x, level, cond):
    def total(x):
      estimate = denoise(x, level, cond)
      return _total('function', function(estimate.x0), x), estimate
    slope, given = jax.grad(total, has_aux=True)(x)
    return given, add_score(widened(given.x0), slope, level, -scale)
  return _during('energy', during, both, inert=scale == 0)


def chain(*transforms: Transform) -> Transform:
  """Apply transforms from left to right: chain(a, b)(denoise) = b(a(denoise)). A config writes it a | b."""
  def transform(denoise):
    for each in transforms:
      denoise = each(denoise)
    return denoise
  return transform


def dropped(x: PyTree, cond: Cond) -> Cond:
  """The condition whose every part, but what is known of x0, the network replaces by its null."""
  lost = jnp.ones(jax.tree.leaves(x)[0].shape[0], bool)
  return {**(cond or {}), 'drop': {name: lost for name in _names(cond) if name != 'known'}}


def replaced(cond: Cond, entries: dict) -> Cond:
  """The condition with these entries in place of its own, at both ends of a blend, each of the shape [B, ...] and dtype of
  the one it replaces."""
  names = _names(cond)
  missing = sorted(set(entries) - set(names))
  if missing:
    raise ValueError(f"{{{missing[0]!r}: ...}} is to replace an entry that cond has not; it has "
                     f"{', '.join(map(repr, names)) or 'none'}.")
  like = lambda old, new: jnp.broadcast_to(jnp.asarray(new, old.dtype), old.shape)
  new = {name: jax.tree.map(like, cond[name], entries[name]) for name in entries}
  if 'towards' in cond:
    share, others = cond['towards']
    new['towards'] = share, {name: new.get(name, value) for name, value in others.items()}
  return {**cond, **new}


def _names(cond: Cond) -> list[str]:
  """The conditions that cond has."""
  return sorted(set(cond or {}) - set(ASIDE))


def branches(denoise: Denoiser, x: PyTree, level: Level, conds: list[Cond],
             used: str | None = 'negative') -> list[Estimate]:
  """Estimates of the same x under several conditions by one batched call. The conditions must have the same entries, but
  for 'drop', which is False where one lacks it and another has it, and the entry `used`, which ends here."""
  batch, count = jax.tree.leaves(x)[0].shape[0], len(conds)
  conds = [{name: value for name, value in (cond or {}).items() if name != used} for cond in conds]
  drops = [cond.get('drop', {}) for cond in conds]
  if any('drop' in cond for cond in conds):
    kept = {name: jnp.zeros(batch, bool) for drop in drops for name in drop}
    conds = [{**cond, 'drop': {**kept, **drop}} for cond, drop in zip(conds, drops, strict=True)]
  # Example by example, not branch by branch: the rows of an example then stay on its device.
  stack = lambda *leaves: jnp.stack(leaves, 1).reshape(batch * count, *leaves[0].shape[1:])
  repeat = lambda leaf: jnp.repeat(leaf, count, 0) if leaf.ndim else leaf
  out = denoise(jax.tree.map(repeat, x), jax.tree.map(repeat, level), jax.tree.map(stack, *conds))
  return [jax.tree.map(lambda leaf, i=i: leaf[i::count], out) for i in range(count)]


def _between(name: str, rule: Callable, weight: float, during: tuple[float, float], negative: dict | None,
             inert: bool | None = None) -> Transform:
  """The row of two branches, of cond and of its null or `negative`. Weight 1 is the denoiser, unless `inert` says else."""
  _check_finite(name, weight=weight)
  def others(x, cond):
    avoided = negative or (cond or {}).get('negative')
    return [replaced(cond, avoided) if avoided else dropped(x, cond)]
  return _during(name, during, _branched(rule, others), weight == 1 if inert is None else inert)


def _branched(rule: Callable, others: Callable) -> Callable:
  """(denoise, x, level, cond) -> (estimate given cond, rule(x, level, x0 of each branch)); `others(x, cond)` are the
  conditions of the branches beside that of cond."""
  def both(denoise, x, level, cond):
    estimates = branches(denoise, x, level, [cond, *others(x, cond)])
    return estimates[0], rule(x, level, *(widened(estimate.x0) for estimate in estimates))
  return both


def _during(name: str, during: tuple[float, float], both: Callable, inert: bool = False) -> Transform:
  """The transform to the x0 of both(denoise, x, level, cond) -> (the denoiser's estimate, x0) while t is in `during`."""
  low, high = during
  if not 0 <= low < high <= 1:
    raise ValueError(f'{name} needs during=(low, high) with 0 <= low < high <= 1; got {during}.')
  def transform(denoise):
    def guided(x, level, cond):
      given, x0 = both(denoise, x, level, cond)
      inside = (low <= level.t) & (level.t <= high)
      choose = lambda ours, theirs: jnp.where(spread(inside, theirs), ours.astype(theirs.dtype), theirs)
      return given._replace(x0=jax.tree.map(choose, x0, given.x0))
    def within(x, level, cond):
      if level.t.ndim:
        return guided(x, level, cond)
      inside = (low <= level.t) & (level.t <= high)
      return jax.lax.cond(inside, guided, denoise, x, level, cond)
    return guided if during == (0.0, 1.0) else within
  return (lambda denoise: denoise) if inert else transform


def add_score(x0: PyTree, slope: PyTree, level: Level, scale: float) -> PyTree:
  """x0 + scale sigma^2 / alpha slope, the estimate whose score is larger by scale slope; x0 where alpha = 0."""
  some = level.alpha > 0
  return combine((1.0, x0), (jnp.where(some, scale * level.sigma**2 / jnp.where(some, level.alpha, 1.0), 0.0), slope))


def extrapolate(weight: float, given: PyTree, null: PyTree) -> PyTree:
  """null + weight (given - null)."""
  return jax.tree.map(lambda c, u: u + weight * (c - u), given, null)


def component(x: PyTree, along: PyTree) -> PyTree:
  """The part of x that is parallel to `along`, example by example; 0 along 0."""
  return combine((ratio(dot(x, along), dot(along, along), 0.0), along))


def ratio(a: Array | float, b: Array, otherwise: float) -> Array:
  """a / b, and `otherwise` where b = 0."""
  return jnp.where(b == 0, otherwise, a / jnp.where(b == 0, 1.0, b))


def widened(x: PyTree) -> PyTree:
  """x in single precision at least, in which sums over an example and differences of estimates are taken."""
  return jax.tree.map(lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)), x)


def _total(name: str, values: Array, x: PyTree) -> Array:
  """The sum of one number an example."""
  batch = jax.tree.leaves(x)[0].shape[0]
  if values.shape != (batch,):
    raise ValueError(f'{name} gives one number an example, shape ({batch},) here; got {values.shape}.')
  return jnp.sum(values)


def _check_finite(name: str, **numbers: float) -> None:
  for field, number in numbers.items():
    if not math.isfinite(number):
      raise ValueError(f'{name} needs a finite {field}; got {number}.')
