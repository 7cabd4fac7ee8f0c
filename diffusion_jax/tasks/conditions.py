"""Conditions that training draws from the data themselves, whatever the task: a view of the image for reference, and what
of it is known."""
import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from diffusion_jax.core.types import split
from diffusion_jax.tasks.task import Task

LEAST = 0.5  # of the side of an image, what its view shows
NOTHING = 0.25  # how often nothing is known


def add(task: Task, reference: bool, known: bool) -> Task:
  """The task with the conditions 'reference', an image to be like, and 'known', what is there already.

  In training they are `view` and `boxes` of x0; asked for, and when they are dropped, they are none and nothing.
  """
  null = {'reference': {'image': np.zeros(task.shape, np.float32), 'given': np.False_}} if reference else {}
  null |= {'known': {'values': np.zeros(task.shape, np.float32),
                     'where': np.zeros((*task.shape[:-1], 1), bool)}} if known else {}
  if not null:
    return task
  def filled(cond, count):
    none = jax.tree.map(lambda leaf: np.broadcast_to(leaf, (count, *leaf.shape)).copy(), null)
    cond = {**(cond or {}), **none}
    if 'negative' in cond:  # leads away from the reference too, but not from what is known
      cond['negative'] = {**cond['negative'], **{name: none[name] for name in null if name != 'known'}}
    return cond
  def encode(rows):
    x0, cond = task.encode(rows)
    return x0, {**(cond or {}), **jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (len(x0), *leaf.shape)), null)}
  def drawn(keys, x0, cond):
    view_keys, box_keys = split(keys, 2)
    found = {'reference': {'image': jax.vmap(view)(view_keys, x0), 'given': jnp.ones(len(x0), bool)},
             'known': {'values': x0, 'where': jax.vmap(lambda key: boxes(key, task.shape[:-1]))(box_keys)}}
    return {**cond, **{name: found[name] for name in null}}
  return task._replace(
      null={**(task.null or {}), **null}, encode=encode, drawn=drawn,
      context=lambda index: filled(task.context(index), len(index)),
      ask=lambda titles: filled(task.ask(titles), len(titles)))


def view(key: Key[Array, ''], x: Float[Array, 'H W C']) -> Float[Array, 'H W C']:
  """A part of the image, half or more of each side, mirrored every second time and enlarged to the whole: it shows what is
  in the image, and less well how much of it and where."""
  size_key, place_key, flip_key = jax.random.split(key, 3)
  space = np.array(x.shape[:-1], np.float32)
  share = jax.random.uniform(size_key, minval=LEAST)
  first = jax.random.uniform(place_key, (2,)) * (1 - share) * space
  x = jnp.where(jax.random.bernoulli(flip_key), x[:, ::-1], x)
  return jax.image.scale_and_translate(x, x.shape, (0, 1), jnp.full(2, 1 / share), -first / share, 'linear')


def boxes(key: Key[Array, ''], space: tuple[int, ...]) -> Bool[Array, '...']:
  """Which entries [*space, 1] are known: a quarter of the time none, else all outside of a random box or all inside it."""
  kind_key, *keys = jax.random.split(key, 1 + len(space))
  inside = jnp.ones(space, bool)
  for axis, (key, size) in enumerate(zip(keys, space, strict=True)):
    low, high = jnp.sort(jax.random.randint(key, (2,), 0, size + 1))
    place = jax.lax.broadcasted_iota(jnp.int32, space, axis)
    inside &= (low <= place) & (place < high)
  kind = jax.random.uniform(kind_key)
  return jnp.where(kind < NOTHING, False, inside ^ (kind < (1 + NOTHING) / 2))[..., None]
