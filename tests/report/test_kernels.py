"""Kernels, bytes and FLOP of a GPU's program, counted by hand in a text like XLA's."""

import pytest

from vnca.report import kernels

PROGRAM = """HloModule call, is_scheduled=true

%multiply_add (a: f32[64,8], b: f32[8,4], c: f32[4]) -> f32[64,4] {
  %a = f32[64,8]{1,0} parameter(0)
  %b = f32[8,4]{1,0} parameter(1)
  %c = f32[4]{0} parameter(2)
  %dot = f32[64,4]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}, \
metadata={op_name="jit(f)/dot"}
  %row = f32[64,4]{1,0} broadcast(%c), dimensions={1}, metadata={op_name="jit(f)/add"}
  ROOT %add = f32[64,4]{1,0} add(%dot, %row)
}

%keep (stack: f32[5,64,4], new: f32[64,4], i: s32[]) -> f32[5,64,4] {
  %stack = f32[5,64,4]{2,1,0} parameter(0)
  %new = f32[64,4]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %one = f32[1,64,4]{2,1,0} bitcast(%new)
  %zero = s32[] constant(0)
  ROOT %update = f32[5,64,4]{2,1,0} dynamic-update-slice(%stack, %one, %i, %zero, %zero)
}

%look (stack: f32[5,64,4], i: s32[]) -> (f32[64,4], f32[4]) {
  %stack = f32[5,64,4]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %renamed = f32[5,64,4]{2,1,0} bitcast(%stack)
  %slice = f32[1,64,4]{2,1,0} dynamic-slice(%renamed, %i, %zero, %zero), \
dynamic_slice_sizes={1,64,4}
  %flat = f32[64,4]{1,0} bitcast(%slice)
  %sum = f32[4]{0} reduce(%flat, %zero), dimensions={0}, to_apply=%plus
  ROOT %both = (f32[64,4]{1,0}, f32[4]{0}) tuple(%flat, %sum)
}

%body (p: (f32[64,8], f32[5,64,4])) -> (f32[64,8], f32[5,64,4]) {
  %p = (f32[64,8]{1,0}, /*index=1*/f32[5,64,4]{2,1,0}) parameter(0)
  %x = f32[64,8]{1,0} get-tuple-element(%p), index=0
  %w = f32[8,4]{1,0} constant({...})
  %b = f32[4]{0} constant({...})
  %y = f32[64,4]{1,0} fusion(%x, %w, %b), kind=kCustom, calls=%multiply_add
  ROOT %t = (f32[64,8]{1,0}, f32[5,64,4]{2,1,0}) tuple(%x, %y)
}

%cheap (q: f32[64,4]) -> f32[64,4] {
  %q = f32[64,4]{1,0} parameter(0)
  ROOT %copy.1 = f32[64,4]{1,0} copy(%q)
}

%dear (q: f32[64,4]) -> f32[64,4] {
  %q = f32[64,4]{1,0} parameter(0)
  %once = f32[64,4]{1,0} copy(%q)
  ROOT %twice = f32[64,4]{1,0} copy(%once)
}

ENTRY %main (x: f32[64,8]) -> f32[64,4] {
  %x = f32[64,8]{1,0} parameter(0)
  %start = (f32[64,8]{1,0}, f32[5,64,4]{2,1,0}) tuple(%x)
  %known = (f32[64,8]{1,0}, f32[5,64,4]{2,1,0}) while(%start), condition=%c, body=%body, \
backend_config={"known_trip_count":{"n":"5"},"known_init_step":{"init":"0","step":"1"}}
  %unknown = (f32[64,8]{1,0}, f32[5,64,4]{2,1,0}) while(%known), condition=%c, body=%body
  %stack = f32[5,64,4]{2,1,0} get-tuple-element(%unknown), index=1
  %y = f32[64,4]{1,0} get-tuple-element(%unknown), index=0
  %i = s32[] constant(3)
  %kept = f32[5,64,4]{2,1,0} fusion(%stack, %y, %i), kind=kLoop, calls=%keep
  %seen = (f32[64,4]{1,0}, f32[4]{0}) fusion(%kept, %i), kind=kInput, calls=%look
  %choice = f32[64,4]{1,0} conditional(%i, %y, %y), branch_computations={%cheap, %dear}
  %g = bf16[2,6,6,16]{3,2,1,0} constant({...})
  %k = bf16[16,3,3,32]{3,2,1,0} constant({...})
  %conv = (bf16[2,6,6,16]{3,2,1,0}, u8[4096]{0}) custom-call(%h, %k), \
window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward"
  %h = bf16[2,6,6,32]{3,2,1,0} constant({...})
  %back = (bf16[16,3,3,32]{3,2,1,0}, u8[0]{0}) custom-call(%h, %g), \
window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, \
custom_call_target="__cudnn$convBackwardFilter"
  %gemm = (f32[64,4]{1,0}, s8[4194304]{0}) custom-call(%x, %w), \
custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":\
{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]},\
"precision_config":{"operand_precision":["HIGHEST","HIGHEST"]}}}
  %w = f32[8,4]{1,0} constant({...})
  %sum = f32[1024]{0} all-reduce-start(%long), to_apply=%plus
  %done = f32[1024]{0} all-reduce-done(%sum)
  %all = (f32[1024]{0}, f32[2048]{0}) all-gather-start(%long), dimensions={0}
  %long = f32[1024]{0} constant({...})
  ROOT %end = f32[64,4]{1,0} copy(%y)
}
"""

NESTED = """HloModule call

%inner (p: f32[64,4]) -> f32[64,4] {
  %p = f32[64,4]{1,0} parameter(0)
  ROOT %turn = f32[64,4]{1,0} copy(%p)
}

%called (p: f32[64,4]) -> f32[64,4] {
  %p = f32[64,4]{1,0} parameter(0)
  ROOT %in_call = f32[64,4]{1,0} copy(%p)
}

%outer (p: f32[64,4]) -> f32[64,4] {
  %p = f32[64,4]{1,0} parameter(0)
  %two = f32[64,4]{1,0} while(%p), condition=%c, body=%inner, \
backend_config={"known_trip_count":{"n":"2"}}
  %a = f32[16]{0} constant({...})
  %b = f32[8]{0} constant({...})
  %sum = (f32[16]{0}, f32[8]{0}) all-reduce-start(%a, %b), to_apply=%plus
  ROOT %jump = f32[64,4]{1,0} call(%two), to_apply=%called
}

%two_copies (q: f32[64,4]) -> f32[64,4] {
  %q = f32[64,4]{1,0} parameter(0)
  %once = f32[64,4]{1,0} copy(%q)
  ROOT %twice = f32[64,4]{1,0} copy(%once)
}

%five_turns (q: f32[64,4]) -> f32[64,4] {
  %q = f32[64,4]{1,0} parameter(0)
  ROOT %five = f32[64,4]{1,0} while(%q), condition=%c, body=%inner, \
backend_config={"known_trip_count":{"n":"5"}}
}

ENTRY %main (x: f32[64,4]) -> f32[64,4] {
  %x = f32[64,4]{1,0} parameter(0)
  %i = s32[] constant(3)
  %three = f32[64,4]{1,0} while(%x), condition=%c, body=%outer, \
backend_config={"known_trip_count":{"n":"3"}}
  %choice = f32[64,4]{1,0} conditional(%i, %x, %x), branch_computations={%two_copies, %five_turns}
  %g = bf16[2,6,6,16]{3,2,1,0} constant({...})
  %k = bf16[16,3,3,32]{3,2,1,0} constant({...})
  ROOT %back = (bf16[2,12,12,32]{3,2,1,0}, u8[0]{0}) custom-call(%g, %k), \
window={size=3x3 stride=2x2 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, \
custom_call_target="__cudnn$convBackwardInput"
}
"""

PRODUCT = 2 * 64 * 8 * 4
TURN = 4 * (64 * 8 + 8 * 4 + 4 + 64 * 4)
CELLS = 4 * 64 * 4


def seconds(kernel):
    return kernel.bytes


@pytest.fixture
def found():
    return {k.instruction.name: k for k in kernels.kernels(PROGRAM, seconds)}


def test_a_loop_counts_as_often_as_it_runs_if_that_is_known(found):
    turns = [k.times for k in kernels.kernels(PROGRAM, seconds, 3) if k.instruction.name == "y"]
    assert turns == [5, 3]


def test_a_fusion_reads_its_operands_and_writes_its_result(found):
    assert (found["y"].bytes, found["y"].flops) == (TURN, PRODUCT)


def test_a_result_that_is_updated_in_place_counts_by_the_update(found):
    assert found["kept"].bytes == CELLS + CELLS + 4  # reads it and the index, and writes it


def test_an_operand_that_is_only_sliced_counts_by_the_slice(found):
    assert found["seen"].bytes == CELLS + 4 + CELLS + 16


def test_of_a_conditional_the_dearest_branch_counts(found):
    assert {"once", "twice"} <= found.keys() and "copy.1" not in found


def test_a_convolution_is_two_flop_a_tap_and_its_scratch_memory_is_left_out(found):
    flops = 2 * (2 * 6 * 6) * (3 * 3 * 32 * 16)
    assert found["conv"].flops == found["back"].flops == flops
    assert found["conv"].bytes == 2 * (2 * 6 * 6 * (16 + 32) + 16 * 3 * 3 * 32)


def test_a_product_of_cublas_counts_like_any_other_and_says_its_precision(found):
    assert found["gemm"].flops == PRODUCT
    assert found["gemm"].exact and not found["y"].exact


def test_sums_name_the_operations_and_the_collectives():
    counted = kernels.count(PROGRAM, seconds, lambda opcode, line: opcode)
    assert counted.kernels == 5 + 1 + 2 + 2 + 2 + 1 + 2 + 1
    assert counted.operations["copy"] == 2 * CELLS * 3
    assert counted.collectives == {"all-reduce": 1, "all-gather": 1}
    assert counted.collective_bytes == {"all-reduce": 4096, "all-gather": 8192}
    assert counted.flops == 6 * PRODUCT + 2 * 2 * 72 * 4608 + PRODUCT


def test_what_is_in_a_loop_in_a_loop_counts_by_the_product_of_their_turns():
    found = [(k.instruction.name, k.times) for k in kernels.kernels(NESTED, seconds)]
    assert found == [("turn", 6), ("sum", 3), ("in_call", 3), ("turn", 5), ("back", 1)]
    flops = 2 * (2 * 6 * 6) * (3 * 3 * 32 * 16)  # of a strided convolution, by its smaller side
    convolution = 2 * (2 * 6 * 6 * 16 + 16 * 3 * 3 * 32 + 2 * 12 * 12 * 32)
    sums = 4 * (16 + 8)
    counted = kernels.count(NESTED, seconds, lambda opcode, line: opcode)
    assert counted.kernels == 18 and counted.flops == flops
    assert counted.bytes == 14 * 2 * CELLS + 3 * 2 * sums + convolution == counted.seconds
    assert counted.collectives == {"all-reduce": 3}
    assert counted.collective_bytes == {"all-reduce": 3 * sums}


def test_a_fusion_without_a_name_has_that_of_its_last_operation_with_one(found):
    assert 'op_name="jit(f)/add"' in found["y"].named
    assert found["kept"].named == found["kept"].instruction.line


def test_a_text_without_an_entry_is_an_error():
    with pytest.raises(ValueError, match="no entry"):
        list(kernels.kernels(PROGRAM.replace("ENTRY ", ""), seconds))
