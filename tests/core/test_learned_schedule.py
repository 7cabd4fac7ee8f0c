"""The learned schedule: the bound depends on its ends alone, and its inner parameters lower the variance."""
import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

from diffusion_jax.core import bounds, schedules, times
from diffusion_jax.core.processes import Gaussian
from diffusion_jax.core.types import Draw, Estimate
from tests import oracles
from tests.core.test_bounds import BITS, ENTRIES, MEAN, VARIANCE, continuous, numbers

LEARNED = schedules.monotone(8, high=6.0, low=-6.0)


def off(process):
  """A denoiser that is wrong, and sees the logsnr alone."""
  exact = ENTRIES.denoiser(process)
  return lambda x, level, cond=None: Estimate(0.8 * exact(x, level).x0 + 0.1 * x)


def expected_bound(params, denoiser):
  """The bound over x0 and the noise, nats an entry, by quadrature: squares of normal numbers need two nodes each."""
  process = Gaussian(LEARNED.bind(params))
  nodes, weight = np.polynomial.legendre.leggauss(100)
  x0, noise = (np.ravel(each) for each in np.meshgrid(MEAN + np.sqrt(VARIANCE) * np.array([-1, 1]), [-1.0, 1.0]))
  level = process.level((nodes + 1) / 2)
  xt = level.alpha[:, None] * x0[None] + level.sigma[:, None] * noise[None]
  rates = process.rate(denoiser(process)(xt, level), jnp.broadcast_to(x0, xt.shape), xt, level).mean(1)
  first, last = process.level(1e-300), process.level(1.0)
  decoded = bounds.density()(x0, x0 + first.sigma / first.alpha * noise, (first.sigma / first.alpha)**2).mean()
  return 0.5 * weight @ rates + decoded + process.prior_divergence(jnp.asarray(x0), last).mean()


def test_the_bound_depends_on_the_ends_of_a_learned_schedule_alone(x64):
  """In expectation, whatever the denoiser; the inner parameters move the rate at every t but not its integral. The slopes
  of the ends are those of the closed form, by central differences."""
  params = LEARNED.init(jax.random.key(0))
  for denoiser in (off, ENTRIES.denoiser):
    slopes = jax.jit(jax.grad(lambda params, denoiser=denoiser: expected_bound(params, denoiser)))(params)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(slopes['inner'])) < 1e-9
  at = lambda high, low: continuous(np.exp(low), np.exp(high))
  np.testing.assert_allclose(slopes['ends']['high'], (at(6.01, -6) - at(5.99, -6)) / 0.02, rtol=1e-4)
  np.testing.assert_allclose(slopes['ends']['low'], (at(6, -5.99) - at(6, -6.01)) / 0.02, rtol=1e-4)


@pytest.mark.parametrize('law', [times.uniform(), times.lognormal(0.0, 2.0)], ids=['uniform', 'lognormal'])
def test_the_drawn_bound_of_a_learned_schedule_has_the_same_slopes(law):
  """variational(high=None) inside a gradient: the mean over draws of the slope of each row, also where the law of the times
  depends on the schedule."""
  params, x0 = LEARNED.init(jax.random.key(0)), numbers(())[:4000]
  def one(params, index, x0):
    process = Gaussian(LEARNED.bind(params))
    terms = bounds.variational(process, law, bounds.density(), high=None)
    return terms(off(process), Draw(jax.random.key(1), index[None], 4000), x0[None]).total[0]
  slopes = jax.jit(jax.vmap(jax.grad(one), (None, 0, 0)))(params, jnp.arange(4000), x0)
  with jax.enable_x64(True):
    expected = jax.jit(jax.grad(lambda params: expected_bound(params, off)))(params)
  for rows, mean in zip(jax.tree.leaves(slopes), jax.tree.leaves(expected), strict=True):
    rows = np.float64(rows)
    assert (np.abs(rows.mean(0) - BITS * mean) <= 4.5 * rows.std(0) / np.sqrt(4000) + 1e-6).all()


def test_the_inner_parameters_learn_to_lower_the_variance_of_the_bound():
  """200 steps of Adam on the square of the diffusion term (arXiv:2107.00630, app. I.2), for data of standard deviation 0.1:
  the variance over t falls to less than a third, and the mean stays."""
  learned, law = schedules.monotone(16, high=10.0, low=-6.0), oracles.Independent(0.0, 0.1)
  def values(inner, key, count):
    process = Gaussian(learned.bind({**start, 'inner': inner}))
    x0 = 0.1 * jax.random.normal(key, (count, 64))
    terms = bounds.variational(process, times.uniform(), bounds.density(), high=None)
    return terms(law.denoiser(process), Draw(key, jnp.arange(count), count), x0).diffusion
  start, optimizer = learned.init(jax.random.key(0)), optax.adam(5e-2)
  @jax.jit
  def train(inner):
    def step(carry, key):
      inner, state = carry
      slopes = jax.grad(lambda inner: jnp.mean(jnp.square(values(inner, key, 64))))(inner)
      updates, state = optimizer.update(slopes, state)
      return (optax.apply_updates(inner, updates), state), None
    return jax.lax.scan(step, (inner, optimizer.init(inner)), jax.random.split(jax.random.key(1), 200))[0][0]
  measure = jax.jit(lambda inner: values(inner, jax.random.key(2), 4000))
  before, after = (np.float64(measure(inner)) for inner in (start['inner'], train(start['inner'])))
  assert after.var() < before.var() / 3
  assert abs(before.mean() - after.mean()) < 4 * np.hypot(before.std(), after.std()) / np.sqrt(4000)
