"""The README's table of rows, each a link to its line: `python -m tests.rows` writes it anew."""
import ast
from pathlib import Path

from diffusion_jax import build
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
  unmasking,
  weights,
)
from diffusion_jax.core.types import Learned, Schedule, Transform

README = Path(__file__).parents[1] / 'README.md'
BEGIN, END = '<!-- rows: written by python -m tests.rows -->', '<!-- end of rows -->'
TABLE = {
  '`schedule`': [(schedules, Schedule), (schedules, Learned), (betas, Schedule)],
  'tables in `discrete(...)`': [(betas, betas.Betas)],
  '`target`, `space`': [(targets, targets.Target)],
  '`loss`': [(losses, losses.Loss), (bounds, losses.Loss)],
  'distances in `regression(...)`': [(losses, losses.Distance)],
  'decoders in `bound(...)`, `hybrid(...)`': [(bounds, bounds.Decoder)],
  '`times`': [(times, times.Times), (times, times.Adaptive)],
  '`weight`': [(weights, weights.Weight)],
  '`uncertainty`': [(weights, Learned)],
  '`grid`': [(grids, grids.Grid)],
  '`transform`, joined by <code>&#124;</code>': [(guidance, Transform), (constraints, Transform)],
  '`solver`': [(module, solvers.Solver) for module in (solvers, singlestep, multistep, correctors)],
  '`evaluate.integrator`': [(ode, ode.Integrator)],
  '`evaluate.trace`': [(likelihood, likelihood.Trace)],
  'in Python: dequantizers': [(likelihood, likelihood.Dequantizer)],
  'in Python: solvers of tokens': [(unmasking, solvers.Solver)],
}
CLASSES = {'in Python: processes': {'processes': ['Gaussian', 'Product'], 'tokens': ['Masked', 'Uniform']}}


def render() -> str:
  """The table, in the order of the functions in their files."""
  lines = ['| config field | rows |', '|---|---|']
  for field, kinds in TABLE.items():
    links = [link for module, kind in kinds for link in _links(module.__name__.split('.')[-1], build.rows(module, kind))]
    lines.append(f'| {field} | {" ".join(links)} |')
  for field, files in CLASSES.items():
    lines.append(f'| {field} | {" ".join(link for name, classes in files.items() for link in _links(name, classes))} |')
  return '\n'.join([BEGIN, *lines, END])


def _links(module, names):
  path = f'diffusion_jax/core/{module}.py'
  nodes = ast.parse((README.parent / path).read_text()).body
  return [f'[{node.name}]({path}#L{node.lineno})' for node in nodes
          if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name in names]


def main() -> None:
  text = README.read_text()
  before, rest = text.split(BEGIN)
  README.write_text(before + render() + rest.split(END)[1])


if __name__ == '__main__':
  main()
