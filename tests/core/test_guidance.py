"""Guidance and constraints, on a mixture whose components are the classes: every denoiser is known."""
import jax
import numpy as np
import pytest
from jax import numpy as jnp

from diffusion_jax.core import guidance
from diffusion_jax.core.processes import Gaussian
from diffusion_jax.core.types import Estimate, Level, Transform
from tests import oracles
from tests.core.tables import MIXTURE, SCHEDULES, TRANSFORMS, check_complete, close, over

PROCESS = Gaussian(SCHEDULES['cosine'])
CLASSES = [oracles.Gaussian(mean, std**2 * np.eye(2)).denoiser(PROCESS)
           for mean, std in zip(MIXTURE.means, MIXTURE.stds, strict=True)]
NULL = MIXTURE.denoiser(PROCESS)
LABEL = jnp.array([0, 1, 1, 0])
X = jax.random.normal(jax.random.key(0), (4, 2))


class Counted:
  """The denoiser of a class-conditional network; `batches` are the sizes it was called (or traced) with."""
  def __init__(self):
    self.batches = []

  def __call__(self, x, level, cond):
    self.batches.append(len(x))
    given = jnp.where(cond['label'][:, None] == 0, CLASSES[0](x, level).x0, CLASSES[1](x, level).x0)
    drop = cond.get('drop', jnp.zeros(len(x), bool))
    return Estimate(jnp.where(drop[:, None], NULL(x, level).x0, given))


def expected(weight, level):
  """x0_null + weight (x0_cond - x0_null), in numpy."""
  one, two, null = jax.jit(lambda level: [law(X, level).x0 for law in (*CLASSES, NULL)])(level)
  given, null = np.where(np.asarray(LABEL)[:, None] == 0, one, two), np.asarray(null)
  return null + weight * (given - null)


def test_the_table_is_complete():
  check_complete(guidance, Transform, TRANSFORMS)


def test_weight_1_is_the_identity():
  denoise = Counted()
  assert guidance.guide(1.0)(denoise) is denoise and guidance.guide(1.0, (0.2, 0.8))(denoise) is denoise
  assert guidance.chain()(denoise) is denoise


@pytest.mark.parametrize('weight', [0.0, 0.5, 3.0, -1.0])
@pytest.mark.parametrize('t', [0.4, np.array([0.1, 0.3, 0.5, 0.9])])
def test_guidance_extrapolates_by_one_call_of_twice_the_batch(weight, t):
  denoise, level = Counted(), PROCESS.level(t)
  out = jax.jit(guidance.guide(weight)(denoise))(X, level, {'label': LABEL})
  assert denoise.batches == [8]
  np.testing.assert_allclose(out.x0, expected(weight, level), atol=1e-5)


@pytest.mark.parametrize('t, inside', [(0.1, False), (0.3, True), (0.5, True), (0.7, True), (0.71, False)])
def test_guidance_acts_within_its_interval_alone(t, inside):
  denoise, level = Counted(), PROCESS.level(t)
  out = jax.jit(guidance.guide(2.5, (0.3, 0.7))(denoise))(X, level, {'label': LABEL})
  assert sorted(denoise.batches) == [4, 8]  # both sides of the branch are traced; one runs
  np.testing.assert_allclose(out.x0, expected(2.5 if inside else 1.0, level), atol=1e-5)


def test_outside_the_interval_half_of_the_work_is_saved():
  ran = []
  def denoise(x, level, cond):
    jax.debug.callback(lambda: ran.append(len(x)))
    return Estimate(x)
  for t in (0.1, 0.5):
    jax.block_until_ready(guidance.guide(2.5, (0.3, 0.7))(denoise)(X, PROCESS.level(t), {'label': LABEL}))
    jax.effects_barrier()
  assert ran == [4, 8]


def test_a_network_without_labels_sees_the_drop_alone():
  denoise = lambda x, level, cond: Estimate(jnp.where(cond['drop'][:, None], 1.0, 2.0) * x)
  np.testing.assert_allclose(guidance.guide(3.0)(denoise)(X, PROCESS.level(0.5), None).x0, 4 * X, rtol=1e-6)


def test_clip():
  denoise = lambda x, level, cond: Estimate({'a': x, 'b': -x})
  x = jnp.array([[-3.0, -0.2], [0.4, 5.0]])
  out = guidance.clip(0.4)(denoise)(x, PROCESS.level(0.5), None).x0
  close(out, {'a': np.float32([[-0.4, -0.2], [0.4, 0.4]]), 'b': np.float32([[0.4, 0.2], [-0.4, -0.4]])})


def test_chain_goes_from_left_to_right():
  level, cond = PROCESS.level(0.5), {'label': LABEL}
  guide, clip = guidance.guide(4.0), guidance.clip(0.4)
  guided_first = guidance.chain(guide, clip)(Counted())(X, level, cond).x0
  np.testing.assert_allclose(guided_first, np.clip(expected(4.0, level), -0.4, 0.4), atol=1e-5)
  clipped_first = guidance.chain(clip, guide)(Counted())(X, level, cond).x0
  null, given = (np.clip(expected(weight, level), -0.4, 0.4) for weight in (0.0, 1.0))
  np.testing.assert_allclose(clipped_first, null + 4 * (given - null), atol=1e-5)
  assert np.abs(guided_first - clipped_first).max() > 0.1


@over('transform', TRANSFORMS)
def test_trees_shapes_and_dtypes_are_kept(transform):
  x = {'a': jnp.ones((4, 3), jnp.bfloat16), 'b': [jnp.ones(4), jnp.ones((4, 2, 2))]}
  def denoise(x, level, cond):
    return Estimate(x, variance=jax.tree.map(jnp.square, x), aux=jnp.ones((len(x['a']), 7)))
  cond = {'label': LABEL, 'text': jnp.ones((4, 5, 6))}
  call = lambda x, level: transform(denoise)(x, level, cond)
  out = jax.eval_shape(call, x, PROCESS.level(0.5))
  assert out == jax.eval_shape(lambda: Estimate(x, x, jnp.ones((4, 7))))


@over('transform', TRANSFORMS)
def test_an_example_keeps_its_own_place(transform):
  """Row i of the result depends on row i alone, whatever the others are."""
  level, order = PROCESS.level(0.5), np.array([2, 0, 3])
  call = jax.jit(transform(Counted()))
  whole = call(X, level, {'label': LABEL}).x0
  part = call(X[order], level, {'label': LABEL[order]}).x0
  np.testing.assert_allclose(part, whole[order], atol=1e-6)


def test_branches_go_example_by_example():
  """The rows of an example are neighbours, so that they stay on its device."""
  seen = []
  def denoise(x, level, cond):
    seen.append((x, level, cond))
    return Estimate(cond['label'][:, None] * x)
  conds = [{'label': jnp.full(2, float(k))} for k in (1, 2, 3)]
  level = PROCESS.level(jnp.array([0.2, 0.8]))
  outs = guidance.branches(denoise, jnp.array([[1.0], [10.0]]), level, conds)
  np.testing.assert_array_equal(np.stack([out.x0[:, 0] for out in outs]), [[1, 10], [2, 20], [3, 30]])
  (x, at, cond), = seen
  np.testing.assert_array_equal(x[:, 0], [1, 1, 1, 10, 10, 10])
  np.testing.assert_allclose(at.t, [0.2] * 3 + [0.8] * 3)
  assert isinstance(at, Level) and not cond['drop'].any()


@pytest.mark.parametrize('call, sentence', [
  (lambda: guidance.guide(2.0, (0.8, 0.2)),
   'guide needs during=(low, high) with 0 <= low < high <= 1; got (0.8, 0.2).'),
  (lambda: guidance.guide(2.0, (0.0, 1.5)),
   'guide needs during=(low, high) with 0 <= low < high <= 1; got (0.0, 1.5).'),
  (lambda: guidance.clip(0.0), 'clip needs limit > 0; got 0.0.'),
])
def test_bad_arguments_get_a_sentence(call, sentence):
  with pytest.raises(ValueError) as error:
    call()
  assert str(error.value) == sentence
