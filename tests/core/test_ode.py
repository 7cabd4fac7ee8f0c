"""Integrators: order and tolerance against closed forms and SciPy, and the true number of calls."""
from functools import partial

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from scipy import integrate

from diffusion_jax.core import ode
from diffusion_jax.core.types import spread
from tests.core.tables import check_complete, close, over

START, END = 0.3, 2.1
X = np.array([[0.5, -1.0], [0.2, -3.0], [0.4, 0.1]])
TOLERANCES = (1e-3, 1e-5, 1e-7, 1e-9)
INTEGRATORS = {'fixed': ode.fixed(100), 'adaptive': ode.adaptive(1e-8, 1e-8)}


def test_the_table_is_complete():
  check_complete(ode, ode.Integrator, INTEGRATORS)


def slope(u, x):
  """Neither linear nor autonomous; it is solved by 1 / x(u) = 1 / x(0) - sin u."""
  return jax.tree.map(lambda leaf: leaf**2 * spread(jnp.cos(u), leaf), x)


def solution(x, start, end):
  return 1 / (1 / np.asarray(x, np.float64) + np.sin(start) - np.sin(end))


def van_der_pol(u, x):
  """A coupled system with fast and slow parts."""
  first, second = x[:, :1], x[:, 1:]
  return jnp.concatenate([second, 5 * (1 - first**2) * second - first], 1)


def peer(method, rtol, x, end):
  """SciPy on one row."""
  right = lambda u, x: [x[1], 5 * (1 - x[0]**2) * x[1] - x[0]]
  return integrate.solve_ivp(right, (0, end), x, method, rtol=rtol, atol=rtol)


def test_fixed_is_of_order_4(x64):
  steps = (10, 20, 40, 80)
  found = [jax.jit(partial(ode.fixed(count), slope))(X, START, END)[0] for count in steps]
  errors = [np.abs(x - solution(X, START, END)).max() for x in found]
  order = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
  print(f'order of fixed: {order:.2f}, errors {errors}')
  assert abs(order - 4) < 0.2


def test_adaptive_meets_its_tolerance(x64):
  """The error falls in proportion to rtol, and is never above ten times it."""
  found = [jax.jit(partial(ode.adaptive(rtol, rtol), slope))(X, START, END)[0] for rtol in TOLERANCES]
  errors = [np.abs(x - solution(X, START, END)).max() for x in found]
  rate = np.polyfit(np.log(TOLERANCES), np.log(errors), 1)[0]
  print(f'error ~ rtol^{rate:.2f}, errors {errors}')
  assert abs(rate - 1) < 0.3 and (np.array(errors) < 10 * np.array(TOLERANCES)).all()


@pytest.mark.parametrize('rtol', [1e-4, 1e-8])
def test_adaptive_against_scipy(rtol, x64):
  """DOP853 is the truth; RK45 is the same pair with the same choice of steps, so that errors and calls are alike."""
  truth, same = (peer(method, tight, [2.0, 0.0], 12.0) for method, tight in (('DOP853', 1e-12), ('RK45', rtol)))
  x, calls = jax.jit(partial(ode.adaptive(rtol, rtol), van_der_pol))(jnp.array([[2.0, 0.0]]), 0.0, 12.0)
  ours, theirs = (np.abs(each - truth.y[:, -1]).max() for each in (x[0], same.y[:, -1]))
  print(f'errors {ours:.1e} and {theirs:.1e}, calls {calls} and {same.nfev}')
  assert ours < 3 * theirs
  assert abs(int(calls) / same.nfev - 1) < 0.15


@over('integrator', INTEGRATORS)
@over('way', {'up': (START, END), 'down': (END, START), 'through 0': (0.4, -0.3), 'nowhere': (START, START)})
def test_the_way_may_go_up_and_down(integrator, way, x64):
  x, _ = jax.jit(partial(integrator, slope))(0.3 * X, *way)
  np.testing.assert_allclose(x, solution(0.3 * X, *way), rtol=1e-6)


@over('integrator', {'fixed': ode.fixed(7), 'adaptive': ode.adaptive(1e-4, 1e-4), 'cut': ode.adaptive(1e-8, 1e-8, 5)})
@over('way', {'up': (0.0, 3.0), 'down': (3.0, 0.0)})
def test_calls_are_counted_and_stay_on_the_way(integrator, way):
  """Run by the host, with rejected steps among them; no call lies beyond the end, where a schedule may stop."""
  seen = []
  with jax.disable_jit():
    f = lambda u, x: seen.append(float(jnp.ravel(u)[0])) or van_der_pol(u, x)
    _, calls = integrator(f, jnp.array([[2.0, 0.0]]), *way)
  assert int(calls) == len(seen)
  assert min(seen) >= 0 and max(seen) <= 3 + 1e-6
  assert seen[0] == way[0]


@over('integrator', INTEGRATORS)
def test_pytrees_are_integrated_like_their_entries(integrator, x64):
  tree = {'a': jnp.array([0.5, 0.2]), 'b': [jnp.linspace(-2.0, 0.4, 12).reshape(2, 2, 3)]}
  flat = jnp.concatenate([leaf.reshape(2, -1) for leaf in jax.tree.leaves(tree)], 1)
  run = jax.jit(partial(integrator, slope))
  (x, calls), (entries, same) = run(tree, START, END), run(flat, START, END)
  close(x, jax.tree.map(lambda leaf: solution(leaf, START, END), tree), rtol=1e-6)
  np.testing.assert_allclose(np.concatenate([leaf.reshape(2, -1) for leaf in jax.tree.leaves(x)], 1), entries, rtol=1e-12)
  assert int(calls) == int(same)


def test_every_row_takes_its_own_steps(x64):
  """Rows from still to stiff: each ends where it does alone, within the tolerance; the calls are those of the slowest."""
  rates, tolerance, u = jnp.array([0.0, 1.0, 5.0, 60.0]), 1e-6, 3.0
  relax = lambda rates, u, x: -rates[:, None] * (x - jnp.cos(u)[:, None])
  run = jax.jit(lambda rates, x: ode.adaptive(tolerance, tolerance)(partial(relax, rates), x, 0.0, u))
  x, calls = run(rates, jnp.ones((4, 1)))
  alone, each = zip(*(run(rates[i:i + 1], jnp.ones((1, 1))) for i in range(4)), strict=True)
  np.testing.assert_allclose(x, np.concatenate(alone), rtol=1e-14)
  assert int(calls) == int(each[3]) > 5 * int(each[1]) > 5
  exact = (rates**2 * np.cos(u) + rates * np.sin(u) + np.exp(-rates * u)) / (1 + rates**2)  # of x' = -k (x - cos u)
  np.testing.assert_allclose(x[:, 0], exact, atol=10 * tolerance)


def test_entries_share_the_error_of_their_row(x64):
  """The root mean square: copies of an entry change nothing, entries that stand still let the others err more."""
  run = lambda x, keep: jax.jit(partial(ode.adaptive(1e-6, 1e-6), lambda u, x: keep * slope(u, x)))(x, START, END)[1]
  one = run(jnp.full((1, 1), 0.5), 1.0)
  assert int(run(jnp.full((4, 9), 0.5), 1.0)) == int(one)
  still = jnp.zeros((1, 100)).at[0, 0].set(1.0)
  assert int(run(jnp.full((1, 100), 0.5), still)) < int(one)


def test_too_few_steps_give_nan():
  x, calls = jax.jit(partial(ode.adaptive(most=4), slope))({'a': X, 'b': X[:, 0]}, START, END)
  assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(x)) and int(calls) == 1 + 6 * 4


def test_a_slope_that_is_not_a_number_gives_nan():
  x, calls = jax.jit(partial(ode.adaptive(most=30), lambda u, x: x * jnp.nan))(X, START, END)
  assert np.isnan(x).all() and int(calls) <= 1 + 6 * 30


def test_a_step_out_of_the_domain_is_taken_again(x64):
  """x' = -sqrt(x) from 1 is (1 - u / 2)^2; wide steps near u = 2 reach negative x, where the root is NaN."""
  seen = []
  def f(u, x):
    seen.append(bool((x < 0).any()))
    return -jnp.sqrt(x)
  with jax.disable_jit():
    x, _ = ode.adaptive(1e-2, 1e-2)(f, jnp.ones((1, 1)), 0.0, 1.98)
  assert any(seen)
  np.testing.assert_allclose(x, 1e-4, atol=1e-2)


@over('integrator', {'fixed': ode.fixed(), 'adaptive': ode.adaptive()})
def test_single_precision(integrator):
  x, _ = jax.jit(partial(integrator, slope))(X, START, END)
  assert x.dtype == jnp.float32
  np.testing.assert_allclose(x, solution(X, START, END), rtol=1e-4)


@pytest.mark.parametrize('call, sentence', [
  (lambda: ode.fixed(0), 'fixed needs steps >= 1; got 0.'),
  (lambda: ode.adaptive(-1e-3), 'adaptive needs rtol, atol >= 0, not both 0, and most >= 1; got -0.001, 1e-05, 10000.'),
  (lambda: ode.adaptive(0.0, 0.0), 'adaptive needs rtol, atol >= 0, not both 0, and most >= 1; got 0.0, 0.0, 10000.'),
  (lambda: ode.adaptive(most=0), 'adaptive needs rtol, atol >= 0, not both 0, and most >= 1; got 1e-05, 1e-05, 0.'),
])
def test_bad_arguments_get_a_sentence(call, sentence):
  with pytest.raises(ValueError) as error:
    call()
  assert str(error.value) == sentence
