"""Solvers of masked tokens: probabilities by hand, laws of whole walks by enumeration, and the protocol."""
import inspect
import itertools
from functools import partial

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from scipy import special, stats

from diffusion_jax.core import sampling, unmasking
from diffusion_jax.core.processes import Gaussian
from diffusion_jax.core.solvers import Solver
from diffusion_jax.core.tokens import Masked, Uniform
from diffusion_jax.core.types import Estimate, split
from tests import oracles
from tests.core.tables import SCHEDULES, UNMASKING, check_complete, keys, over

CLASSES, P_VALUE, RANDOM = 3, 1e-3, 1e6  # at this temperature the order is random
PROCESS = Masked(SCHEDULES['flow'], CLASSES)
TABLE = np.array([[0.7, 0.2, 0.1], [0.1, 0.2, 0.7], [0.25, 0.7, 0.05]])
SOURCE = oracles.Markov(np.array([0.5, 0.28, 0.22]), TABLE, 3)  # no two chances are equal, so greedy is unambiguous
WORDS, STATES = (np.array(list(itertools.product(range(size), repeat=3))) for size in (CLASSES, CLASSES + 1))
LAW = np.exp(SOURCE.log_prob(WORDS))
REMDM = {'cap': (unmasking.remdm('cap', 0.3), lambda a_t, a_s: min(0.3, (1 - a_s) / a_t)),
         'rescale': (unmasking.remdm('rescale', 0.4), lambda a_t, a_s: 0.4 * min(1, (1 - a_s) / a_t))}


def words(solver, steps, count=8000, source=SOURCE):
  """Words that a walk of even steps draws with the exact denoiser, [count, length]."""
  like, grid = jax.ShapeDtypeStruct((source.length,), jnp.int32), np.linspace(1, 0, steps + 1)
  run = jax.jit(lambda keys: sampling.sample(keys, PROCESS, solver, source.denoiser(PROCESS), grid, like))
  return np.asarray(run(keys(count, steps)))


def p_value(x, law):
  """That the words x have the law, by chi-square; all words of which fewer than 20 are expected count as one."""
  seen, expected = np.bincount(np.ravel_multi_index(x.T, (CLASSES,) * x.shape[1]), minlength=law.size), len(x) * law.ravel()
  cell = np.where(expected < 20, 0, 1 + np.arange(law.size))
  seen, expected = np.bincount(cell, seen), np.bincount(cell, expected)
  return stats.chisquare(seen[expected > 0], expected[expected > 0]).pvalue


def given(state):
  """p(x0_i | the revealed entries of the state) [i, x0_i], by enumeration of the words that agree with it."""
  law = LAW * ((state == CLASSES) | (WORDS == state)).all(1)
  return np.stack([np.bincount(WORDS[:, i], law, CLASSES) for i in range(3)]) / law.sum()


GIVEN = np.stack([given(state) for state in STATES])


def remdm_law(sigma, grid):
  """The law of the words [27] to which remdm walks down the grid of flow, every entry moving on its own given xt."""
  law = (STATES == CLASSES).all(1) * 1.0
  for a_t, a_s in itertools.pairwise(1 - grid):
    again = 0 if a_t == 0 else sigma(a_t, a_s)
    shown = (a_s - (1 - again) * a_t) / (1 - a_t)
    masked = np.concatenate([shown * GIVEN, np.full((64, 3, 1), 1 - shown)], 2)
    kept = (1 - again) * np.eye(4)[STATES] + again * np.eye(4)[-1]
    moves = np.where((STATES == CLASSES)[..., None], masked, kept)
    law = np.einsum('x,xa,xb,xc->abc', law, *moves.transpose(1, 0, 2)).ravel()
  return law[(STATES < CLASSES).all(1)]


def greedy_law():
  """The law of the words to which three greedy steps walk: of the tokens drawn, the likeliest stays."""
  law = {(CLASSES,) * 3: 1.0}
  for _ in range(3):
    after = {}
    for state, mass in law.items():
      p = GIVEN[np.ravel_multi_index(state, (4,) * 3)]
      masked = [i for i in range(3) if state[i] == CLASSES]
      for drawn in itertools.product(range(CLASSES), repeat=len(masked)):
        chances = [p[i, token] for i, token in zip(masked, drawn, strict=True)]
        best = max(range(len(masked)), key=lambda i: chances[i])
        new = tuple(drawn[best] if i == masked[best] else token for i, token in enumerate(state))
        after[new] = after.get(new, 0.0) + mass * np.prod(chances)
    law = after
  return np.array([law.get(tuple(word), 0.0) for word in WORDS])


def distance(law):
  """In total variation from the law of the source."""
  return 0.5 * np.abs(law - LAW).sum()


def test_the_table_is_complete():
  check_complete(unmasking, Solver, UNMASKING)


@over('kind', REMDM)
def test_a_step_of_remdm_at_the_true_data_keeps_the_marginal(kind):
  """q(xs | x0) as from the process, sigma of the revealed masked again, no token but x0; at levels of every entry's own,
  from all mask, and where sigma_max is 1 and where it is below eta."""
  solver, sigma = kind
  count, t, s = 20000, np.array([0.6, 0.8, 1.0, 0.3]), np.array([0.3, 0.7, 0.5, 0.1])
  x0 = jnp.broadcast_to(jnp.array([0, 1, 2, 0]), (count, 4))
  levels = [PROCESS.level(jnp.broadcast_to(time, (count, 4))) for time in (t, s)]
  @jax.jit
  def draw(first, second):
    xt = PROCESS.corrupt(first, x0, levels[0])[0]
    denoise = lambda x, level: Estimate(100 * jax.nn.one_hot(x0, CLASSES))
    return xt, solver.step(PROCESS, denoise, second, xt, *levels, ())[0]
  xt, xs = draw(*split(keys(count), 2))
  assert ((xs == x0) | (xs == CLASSES)).all()
  for i, (high, low) in enumerate(zip(t, s, strict=True)):
    was, now = (np.asarray(x[:, i] == CLASSES) for x in (xt, xs))
    assert stats.binomtest(int(now.sum()), count, low).pvalue > P_VALUE
    again = 0.0 if high == 1 else sigma(1 - high, 1 - low)
    if high == 1:
      assert was.all()
    else:
      assert stats.binomtest(int(now[~was].sum()), int((~was).sum()), again).pvalue > P_VALUE


@over('solver', {kind: unmasking.remdm(kind, 0.0) for kind in REMDM})
def test_remdm_with_eta_0_has_the_law_of_bayes(solver):
  """A mask becomes each token with (alpha_s - alpha_t) / (1 - alpha_t) p, and nothing else moves."""
  p, x = np.array([0.6, 0.3, 0.1]), jnp.broadcast_to(jnp.arange(40) % 4, (1000, 40))
  denoise = lambda x, level: Estimate(jnp.broadcast_to(jnp.log(p), (*x.shape, CLASSES)))
  levels = PROCESS.level(0.7), PROCESS.level(0.45)
  xs = jax.jit(lambda keys: solver.step(PROCESS, denoise, keys, x, *levels, ())[0])(keys(1000))
  np.testing.assert_array_equal(xs[x < CLASSES], x[x < CLASSES])
  seen = np.bincount(np.ravel(xs[x == CLASSES]), minlength=4)
  assert stats.chisquare(seen, 10000 * np.append(p * 0.25 / 0.7, 0.45 / 0.7)).pvalue > P_VALUE


@over('kind', REMDM)
def test_remdm_walks_to_the_enumerated_law(kind):
  """In three steps that of its moves, far from the data; the distance falls with the steps."""
  solver, sigma = kind
  laws = [remdm_law(sigma, np.linspace(1, 0, steps + 1)) for steps in (1, 3, 16, 64)]
  far = [distance(law) for law in laws]
  print('distance from the data in 1, 3, 16, 64 steps:', np.round(far, 4))
  assert far == sorted(far, reverse=True) and far[1] > 0.05 and far[-1] < 0.03
  assert p_value(words(solver, 3), laws[1]) > P_VALUE


@pytest.mark.parametrize('kind', REMDM)
def test_many_steps_of_remdm_have_the_law_of_the_data(kind):
  """An eta as small as the paper's: with a large one the law nears that of the data by the root of the step alone."""
  assert p_value(words(unmasking.remdm(kind, 0.02), 64, 4000), LAW) > P_VALUE


@pytest.mark.parametrize('temperature', [0.7, 4.5])
def test_maskgit_chooses_between_two_tokens_by_a_logistic_law(temperature):
  """Two steps reveal a pair. The difference of two Gumbel draws is logistic, so the first is a token a at the place i with
  the chance of a sigmoid of (log p_i(a) - log p_j(b)) / (temperature / 2), b being what was drawn beside it."""
  pair = oracles.Markov(SOURCE.initial, TABLE, 2)
  joint = SOURCE.initial[:, None] * TABLE
  one, two = joint.sum(1), joint.sum(0)
  gap = np.log(one)[:, None] - np.log(two)[None]
  first = special.expit(gap / (temperature / 2))
  drawn = one[:, None] * two[None]
  expected = (drawn * first).sum(1)[:, None] * joint / one[:, None] + (drawn * (1 - first)).sum(0)[None] * joint / two[None]
  assert p_value(words(unmasking.maskgit(temperature), 2, source=pair), expected) > P_VALUE
  far = 0.5 * np.abs(expected - joint).sum()
  print(f'distance from the data at temperature {temperature}: {far:.4f}')
  assert (far > 0.05) == (temperature < 4)


def test_maskgit_in_a_random_order_has_the_law_of_the_data():
  """One entry a step or none, and the exact denoiser: exactly, not in the limit of many steps."""
  x = words(unmasking.maskgit(RANDOM), 7)
  assert p_value(x, LAW) > P_VALUE
  log_p = SOURCE.log_prob(x)
  assert abs(log_p.mean() + SOURCE.entropy) < 4 * log_p.std() / np.sqrt(len(x))


def test_greedy_maskgit_prefers_likely_words():
  """With the exact denoiser: its law is the enumerated one, whose mean log-probability is above that of the data."""
  law = greedy_law()
  x = words(unmasking.maskgit(0.0), 3)
  log_p = SOURCE.log_prob(x)
  gain = law @ SOURCE.log_prob(WORDS) + SOURCE.entropy
  print(f'greedy: distance {distance(law):.4f}, mean log p above the data by {gain:.4f}, measured '
        f'{log_p.mean() + SOURCE.entropy:.4f}; entropy {stats.entropy(law):.4f} of {SOURCE.entropy:.4f}')
  assert p_value(x, law) > P_VALUE
  assert gain > 0.1 and log_p.mean() + SOURCE.entropy > 4 * log_p.std() / np.sqrt(len(x))


def test_maskgit_leaves_as_many_masks_as_stated():
  """At every level of the cosine schedule, of 15 entries; and what is revealed stays."""
  process, grid = Masked(SCHEDULES['cosine'], CLASSES), np.linspace(1, 0, 8)
  denoise = lambda x, level, cond=None: Estimate(jnp.sin(jnp.arange(x.size * 3.0)).reshape(*x.shape, 3))
  like = jax.ShapeDtypeStruct((5, 3), jnp.int8)
  run = lambda keys: sampling.trajectory(keys, process, unmasking.maskgit(), denoise, grid, like)[0]
  xs = np.asarray(jax.jit(run)(keys(6)))
  left = np.round(15 * (1 - np.cos(np.pi / 2 * grid)))
  np.testing.assert_array_equal((xs == CLASSES).sum((2, 3)), np.broadcast_to(left[:, None], (8, 6)))
  assert left[-2] == 0 and xs.dtype == np.int8 and (left[1:] < left[:-1]).sum() == 6
  for before, after in itertools.pairwise(xs):
    np.testing.assert_array_equal(after[before < CLASSES], before[before < CLASSES])


def test_maskgit_counts_all_entries_of_an_example_at_its_own_level():
  """Of ten entries four were known: at 1 - alpha_s = 0.8 and 0.6 nothing is revealed, at 0.2 all but two."""
  x = jnp.where(jnp.arange(10) < 4, 1, jnp.full((3, 10), CLASSES))
  denoise = lambda x, level: Estimate(jnp.zeros((*x.shape, CLASSES)))
  t, s = PROCESS.level(jnp.array([1.0, 0.9, 0.9])), PROCESS.level(jnp.array([0.8, 0.6, 0.2]))
  xs = jax.jit(lambda keys: unmasking.maskgit().step(PROCESS, denoise, keys, x, t, s, ())[0])(keys(3))
  np.testing.assert_array_equal((xs == CLASSES).sum(1), [6, 6, 2])
  np.testing.assert_array_equal(xs[:, :4], 1)


@over('solver', UNMASKING)
@pytest.mark.parametrize('shape, dtype', [((2,), jnp.uint8), ((2, 3), jnp.int32), ((2, 2, 2), jnp.int32)])
def test_the_protocol(solver, shape, dtype):
  """The names of the arguments; x keeps its shape and dtype, there is no memory, and the denoiser is called once."""
  assert list(inspect.signature(solver.step).parameters) == ['process', 'denoise', 'keys', 'x', 't', 's', 'memory']
  calls, x = [], jnp.full(shape, CLASSES, dtype)
  denoise = lambda x, level: calls.append(level) or Estimate(jnp.zeros((*x.shape, CLASSES)))
  assert solver.order is None and solver.calls == 1 and solver.init(x) == ()
  step = partial(solver.step, PROCESS, denoise, keys(2))
  xs, memory = jax.eval_shape(step, x, PROCESS.level(0.8), PROCESS.level(0.6), ())
  assert (xs.shape, xs.dtype, memory, len(calls)) == (shape, dtype, (), 1)


@over('solver', {name: UNMASKING[name] for name in ('maskgit', 'remdm(rescale)')})
def test_a_sample_does_not_depend_on_the_batch_and_is_traced_once(solver):
  traces, like, grid = [], jax.ShapeDtypeStruct((3,), jnp.int32), np.linspace(1, 0, 9)
  denoise = lambda x, level, cond=None: traces.append(1) or SOURCE.denoiser(PROCESS)(x, level)
  run = jax.jit(lambda keys: sampling.sample(keys, PROCESS, solver, denoise, grid, like))
  whole, count = run(keys(40)), len(traces)
  again = run(keys(40, seed=1))
  assert len(traces) == count <= 3 and (whole != again).any()
  order = (7 * np.arange(40) + 3) % 33
  np.testing.assert_array_equal(run(keys(40)[order]), whole[order])


@pytest.mark.parametrize('process', [Gaussian(SCHEDULES['cosine']), Uniform(SCHEDULES['flow'], CLASSES)])
@over('solver', {name: UNMASKING[name] for name in ('maskgit', 'remdm')})
def test_another_process_gets_a_sentence(solver, process):
  x = jnp.zeros((2, 3), int)
  with pytest.raises(ValueError, match=r'reveals the masks of the process Masked; got (Gaussian|Uniform). Take '):
    solver.step(process, None, keys(2), x, process.level(0.8), process.level(0.6), ())


@pytest.mark.parametrize('build, sentence', [
  (lambda: unmasking.maskgit(-1.0), r'maskgit needs a finite temperature >= 0; got -1.0.'),
  (lambda: unmasking.maskgit(np.inf), r'maskgit needs a finite temperature >= 0; got inf.'),
  (lambda: unmasking.remdm('loop', 0.1), r"remdm has the kinds cap, rescale; got 'loop'."),
  (lambda: unmasking.remdm('cap', 1.5), r'remdm needs 0 <= eta <= 1; got 1.5.')])
def test_bad_options_get_a_sentence(build, sentence):
  with pytest.raises(ValueError, match=sentence):
    build()
