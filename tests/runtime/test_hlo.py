"""Reading compiled programs: of eight fake devices, whose traffic is known, and of lines as libtpu writes them."""
import jax
import numpy as np
import pytest
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P

from diffusion_jax.runtime import hlo
from diffusion_jax.runtime.mesh import by_example, make_mesh, replicated, shard_bytes

SIZE = 2 * 300 * 4  # bytes of a device's part


def exchange(kind, x):
  """One collective over the axis of devices."""
  whole = jnp.stack([x] * 8)
  return {'all-reduce': lambda: jax.lax.psum(x, 'data'),
          'all-gather': lambda: jax.lax.all_gather(x, 'data'),
          'reduce-scatter': lambda: jax.lax.psum_scatter(whole, 'data'),
          'all-to-all': lambda: jax.lax.all_to_all(whole, 'data', 0, 0),
          'collective-permute': lambda: jax.lax.ppermute(x, 'data', [(i, (i + 1) % 8) for i in range(8)])}[kind]()


def compiled(function):
  mesh = make_mesh('data=8')
  mapped = jax.shard_map(function, mesh=mesh, in_specs=P('data'), out_specs=P('data'), check_vma=False)
  return jax.jit(mapped).lower(jax.ShapeDtypeStruct((16, 300), jnp.float32, sharding=by_example(mesh))).compile()


# (bytes of the whole array, bytes that a device sends at least) in parts
TRAFFIC = {'all-reduce': (1, 2 * 7 / 8), 'all-gather': (8, 7), 'reduce-scatter': (8, 7), 'all-to-all': (8, 7),
           'collective-permute': (1, 1)}


@pytest.mark.parametrize('kind', TRAFFIC)
def test_collectives(kind):
  whole, sent = TRAFFIC[kind]
  found = hlo.collectives(compiled(lambda x: exchange(kind, x)).as_text(), 8)
  assert found == {kind: {'count': 1, 'bytes': whole * SIZE, 'sent': sent * SIZE}}


def test_a_loop_of_five_sends_five_times():
  loop = lambda x: jax.lax.scan(lambda h, _: (jax.lax.psum(h, 'data') / 8, None), x, None, length=5)[0]
  found = hlo.collectives(compiled(loop).as_text(), 8)
  assert found == {'all-reduce': {'count': 5, 'bytes': 5 * SIZE, 'sent': 5 * SIZE * 2 * 7 / 8}}


def test_a_program_on_one_device_sends_nothing():
  assert hlo.collectives(jax.jit(jnp.sin).lower(jnp.ones(3)).compile().as_text(), 1) == {}


@pytest.mark.parametrize('text, size', [
    ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, use_global", 4),
    ("replica_groups=mesh['axis_0'=8] {'axis_0'}", 8),
    ('replica_groups=[2,16]<=[32], x', 16), ('replica_groups={{0,2,4},{1,3,5}}, x', 3), ('channel_id=1', 64)])
def test_group_sizes(text, size):
  assert hlo.group_size(text, 64) == size


def test_arguments_are_the_shards_of_the_state():
  """Those of a program that uses all of them, and XLA's own sum."""
  mesh = make_mesh('data=8')
  shapes = {'a': jax.ShapeDtypeStruct((16, 3), jnp.float32, sharding=by_example(mesh)),
            'b': jax.ShapeDtypeStruct((5, 7), jnp.bfloat16, sharding=replicated(mesh)),
            'c': jax.ShapeDtypeStruct((), jnp.bool_, sharding=replicated(mesh))}
  program = jax.jit(lambda tree: jax.tree.map(jnp.negative, {**tree, 'c': ~tree['c'] * 1})).lower(shapes).compile()
  expected = 2 * 3 * 4 + 5 * 7 * 2 + 1
  assert shard_bytes(shapes) == expected
  assert sum(tensor.bytes for tensor in hlo.parameters(program.as_text())) == expected
  assert program.memory_analysis().argument_size_in_bytes == expected


TPU = '''HloModule jit_f, is_scheduled=true

%fused (p: f32[16,32,32,3]) -> f32[16,32,32,3] {
  %p = f32[16,32,32,3]{3,0,2,1:T(8,128)} parameter(0)
  ROOT %big = f32[16,32,32,3]{3,0,2,1:T(8,128)} sine(%p)
}

%condition (c: (s32[], bf16[10,130])) -> pred[] {
  %c = (s32[]{:T(128)}, bf16[10,130]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  %limit = s32[]{:T(128)} constant(63)
  ROOT %less = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%body (b: (s32[], bf16[10,130])) -> (s32[], bf16[10,130]) {
  %b = (s32[]{:T(128)}, bf16[10,130]{1,0:T(8,128)(2,1)}) parameter(0)
  %x = bf16[10,130]{1,0:T(8,128)(2,1)} get-tuple-element(%b), index=1
  %copy-start = (bf16[10,130]{1,0:T(8,128)(2,1)S(1)}, bf16[10,130]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%x)
  %copy-done = bf16[10,130]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start)
  %y = bf16[10,130]{1,0:T(8,128)(2,1)} negate(%copy-done), metadata={op_name="jit(f)/neg"}
  ROOT %t = (s32[]{:T(128)}, bf16[10,130]{1,0:T(8,128)(2,1)}) tuple(%x, %y)
}

ENTRY %main (a: f32[16,32,32,3], b: bf16[10,130]) -> bf16[10,130] {
  %a = f32[16,32,32,3]{3,0,2,1:T(8,128)} parameter(0), metadata={op_name="batch"}
  %b.1 = bf16[10,130]{1,0:T(8,128)(2,1)} parameter(1)
  %f = f32[16,32,32,3]{3,0,2,1:T(8,128)S(1)} fusion(%a), kind=kLoop, calls=%fused
  %slice = ((f32[16,32,32,3]{3,0,2,1:T(8,128)}), f32[16,1,32,3]{3,0,2,1:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%a)
  %w = (s32[]{:T(128)}, bf16[10,130]{1,0:T(8,128)(2,1)}) while(%b.1), condition=%condition, body=%body
  ROOT %r = bf16[10,130]{1,0:T(8,128)(2,1)} get-tuple-element(%w), index=1
}
'''


def test_tiles_and_memory_spaces_as_libtpu_writes_them():
  """Channels fill 3 of 128 lanes and the batch 16 of 16 sublanes; 10 x 130 becomes 16 x 256; the loop runs 63 times, and
  reads from HBM once and writes to it once each time; of a slice the slice is read; what lies in VMEM, S(1), is not HBM."""
  image, small = 32 * 32 * 16 * 128 * 4, 16 * 256 * 2
  arguments = hlo.parameters(TPU)
  assert [(each.bytes, each.padded) for each in arguments] == [(16 * 32 * 32 * 3 * 4, image), (10 * 130 * 2, small)]
  assert arguments[0].source == 'batch'
  written = hlo.tensors(TPU)
  assert [(each.source, each.padded) for each in written if each.opcode == 'negate'] == [('jit(f)/neg', small)]
  assert all(each.opcode not in ('sine', 'fusion') for each in written)
  assert hlo.runs(hlo.computations(TPU)) == {'fused': 1, 'condition': 63, 'body': 63, '': 1}
  counters = 63 * (2 * 128 * 4 + 512)  # the condition reads two numbers and writes one
  assert hlo.moved(TPU) == image + image // 32 + 63 * 2 * small + counters


def test_padding_of_every_rank_by_hand():
  sizes = lambda text: [(size, padded) for _, size, padded, _ in hlo._shapes(text)]
  assert sizes('f32[]{:T(128)}') == [(4, 512)] and sizes('f32[32]{0:T(128)}') == [(128, 512)]
  assert sizes('(s8[7]{0}, pred[3,5])') == [(7, 7), (15, 15)]
  np.testing.assert_equal(sizes('f32[3,3,96,64]{2,3,1,0:T(8,128)}'), [(9 * 96 * 64 * 4, 9 * 128 * 64 * 4)])
