// The handlers that decode.cpp gives to instructions; arithmetic.cpp and convert.cpp choose their own.
#pragma once

#include "machine.h"

namespace vgpu {

// Loads and stores; the address is in[0] + immediate, stored values follow it.
Next load_global(Thread&, const Instruction&);
Next store_global(Thread&, const Instruction&);
Next add_global(Thread&, const Instruction&);   // atom: the number that was there goes to out[0]; kind: its Order
Next load_shared(Thread&, const Instruction&);  // kind: the address is one of the cluster
Next store_shared(Thread&, const Instruction&);
Next load_local(Thread&, const Instruction&);
Next store_local(Thread&, const Instruction&);
Next load_generic(Thread&, const Instruction&);
Next store_generic(Thread&, const Instruction&);
Next load_parameter(Thread&, const Instruction&);
Next load_scratch(Thread&, const Instruction&);  // the .param space of a call
Next store_scratch(Thread&, const Instruction&);
Next map_address(Thread&, const Instruction&);  // mapa

Next jump(Thread&, const Instruction&);
Next leave(Thread&, const Instruction&);
Next trap(Thread&, const Instruction&);
Next call(Thread&, const Instruction&);
Next after_call(Thread&, const Instruction&);
Next give_back(Thread&, const Instruction&);  // ret
Next special_register(Thread&, const Instruction&);
Next nothing(Thread&, const Instruction&);

// Of a warp: kind says which.
enum Collective : u8 { SHUFFLE, WARP_BARRIER, REDUCE, VOTE, ELECT, LOAD_MATRIX, STORE_MATRIX };
enum Shuffle : u8 { BUTTERFLY, INDEX, UP, DOWN };
enum Reduction : u8 { ADD, MIN_U, MAX_U, MIN_S, MAX_S, AND, OR, XOR, MIN_F, MAX_F, MIN_NAN, MAX_NAN };
enum Vote : u8 { BALLOT, ANY, ALL, UNIFORM };
Next collective(Thread&, const Instruction&);

Next block_barrier(Thread&, const Instruction&);
Next cluster_arrive(Thread&, const Instruction&);
Next cluster_wait(Thread&, const Instruction&);
Next device_fence(Thread&, const Instruction&);

Next barrier_init(Thread&, const Instruction&);
Next barrier_arrive(Thread&, const Instruction&);
Next barrier_expect(Thread&, const Instruction&);
Next barrier_wait(Thread&, const Instruction&);
Next fence_init(Thread&, const Instruction&);
Next fence_proxy(Thread&, const Instruction&);
Next bulk_copy(Thread&, const Instruction&);
Next async_store(Thread&, const Instruction&);
Next async_copy(Thread&, const Instruction&);
Next async_copy_arrive(Thread&, const Instruction&);

// The numbers that name special registers in `kind`.
int special_register_of(const std::string& name);  // -1: it is none

}  // namespace vgpu
