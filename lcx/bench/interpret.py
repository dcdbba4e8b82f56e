"""GPU interpret mode of JAX 0.11.2 with its gaps filled, and `interpreted`, which runs a kernel in it and fails on any race.

The interpreter runs a Mosaic GPU kernel on the CPU, one Python thread a warpgroup, with vector clocks for race detection.  What it
lacks and attention needs is added here, by wrapping `JaxprInterpreter`: `pl.run_state` over `ACC.init`, wgmma whose A operand lies in
registers, `copy_smem_to_gmem` with a predicate or a reduction, atomic stores.  It also checks the shared memory that a wgmma reads
against the writes of TMA (upstream does not): a wgmma before its `barrier_wait`, or after the arrival that frees its operand, is a race.

Blind spot: a wgmma is finished when it is issued (`wgmma_wait` does nothing), so reuse of an operand before the wait is
invisible; blocks run one after another; registers, banks, alignment and the lowering itself (see lcx/bench/compiled.py).
"""

import contextlib
import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import callback
from jax._src import core as jax_core
from jax._src.pallas.mosaic_gpu import core as gpu_core
from jax._src.pallas.mosaic_gpu import primitives as gpu_primitives
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret
from jax._src.pallas.mosaic_gpu.interpret import shared_memory as memory
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams, force_gpu_interpret_mode
from jax._src.state import discharge
from jax._src.state import types as state_types

PARAMS = InterpretGPUParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")
SECONDS = 100.0  # a deadlock would hang for ever: pytest's own timeout cannot interrupt a program of XLA

_Interpreter = jaxpr_interpret.JaxprInterpreter
_interpret, _wgmma_ref = _Interpreter.interpret, _Interpreter._interpret_wgmma_ref_p
_Detector = gpu_callbacks.GPURaceDetectionState
_copy_out = _Interpreter._interpret_copy_smem_to_gmem_p
_TOKEN = gpu_callbacks.TOKEN_SHAPE_DTYPE
_REDUCE = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def _access(key_array, transforms):
    """Return the key and the range that `transforms` select of its buffer."""
    key = gpu_callbacks.HostAllocationKey.from_array(key_array)
    transforms = jax.tree.map(int, gpu_callbacks._remove_noop_transforms(transforms))
    return key, gpu_callbacks._get_shared_memory().access(key, transforms)


def _io_callback(interpreter, eqn, function, token, *args, result=_TOKEN, **static):
    function = functools.partial(function, source_info=eqn.source_info, **static)
    return callback.io_callback(
        function, result, token, mesh_location=interpreter.mesh_location, thread=interpreter.thread, args=args
    )


# wgmma: A in registers, and race checks on its reads


def _wgmma_clock(shared, thread):
    """Return the time of a wgmma's reads: it counts in the place of the thread's first warp, which warpgroup code leaves unused.

    In the thread's own place it would hide register reads that `commit_smem` has not ordered before.
    """
    with shared.lock:
        clocks = shared.clocks[thread]
        clocks.inc(shared.thread_to_vc_position(thread.warp(0) if isinstance(thread, memory.Warpgroup) else thread))
        # operands are read through the async proxy, as TMA writes them
        return clocks.async_smem_clock.copy()


@gpu_callbacks.fail_on_exception
def _wgmma(token, mesh_location, thread, args, source_info, a_is_value):
    acc_ref, a_ref, b_ref = args
    shared = gpu_callbacks._get_shared_memory()
    log = memory.GPULoggingInfo(mesh_location, thread, source_info)
    clock = _wgmma_clock(shared, thread) if shared.detect_races else None

    def read(ref, in_shared_memory=True):
        key, access = _access(*ref)
        value, _, _ = shared.get_buffer_content(key, access, thread, logging_info=log)
        if value is None or value.shape != access.shape:
            raise IndexError(f"out-of-bounds wgmma operand {key}: [{access}]")
        if clock is not None and in_shared_memory:
            gpu_callbacks.get_races().check_read(thread, clock, key, access, source_info=source_info)
        return value

    a, b = np.asarray(a_ref) if a_is_value else read(a_ref), read(b_ref)
    acc = read(acc_ref, in_shared_memory=False)
    key, access = _access(*acc_ref)
    product = np.matmul(a.astype(acc.dtype), b.astype(acc.dtype))
    shared.store_buffer_content(key, access, acc + product, thread, logging_info=log)
    return token


def _interpret_wgmma(self, eqn, token, get_invals):
    acc, a, b, *leaves = get_invals()
    trees, transforms = [eqn.params[f"{name}_transforms_tree"] for name in ("acc", "a", "b")], []
    for tree in trees:
        n = 0 if tree is None else tree.num_leaves
        transforms.append(() if tree is None else jax.tree.unflatten(tree, leaves[:n]))
        leaves = leaves[n:]
    a_is_value = not isinstance(eqn.invars[1].aval, state_types.AbstractRef)
    refs = []
    for i, value in enumerate((acc, a, b)):
        as_value = i == 1 and a_is_value
        refs.append(value if as_value else jaxpr_interpret.resolve_ref(eqn.invars[i].aval, value, transforms[i]))
    return _io_callback(self, eqn, _wgmma, token, *refs, a_is_value=a_is_value), []


# smem -> gmem with a predicate or a reduction


class _ReducingCopy(gpu_callbacks.AsyncCopySmemToGmemTask):
    """TMA store that combines with the stored values; upstream's task only overwrites."""

    reduction = None

    def __call__(self, tma_thread_id):
        if self.reduction is None:
            return super().__call__(tma_thread_id)
        shared = gpu_callbacks._get_shared_memory()
        self.pre_read(tma_thread_id, shared)
        new, _, _ = shared.get_buffer_content(
            self.src_allocation_key, self.src_access, self.thread, logging_info=self.logging_info
        )
        if new is None:
            raise IndexError(f"out-of-bounds copy from {self.src_allocation_key}: [{self.src_access}]")
        # other threads' reductions to the same place are ordered by the memory system: only this write is checked for races
        self.post_read(tma_thread_id, shared)
        shape = tuple(shared.buffer_shape_and_dtype(self.dst_allocation_key).shape)
        store = gpu_callbacks._clip_store_to_shape(self.dst_access, new, shape)
        if store is not None:
            access, new = store
            with _REDUCE_LOCK:
                old, _, _ = shared.get_buffer_content(
                    self.dst_allocation_key, access, self.thread, logging_info=self.logging_info
                )
                shared.store_buffer_content(
                    self.dst_allocation_key,
                    access,
                    self.reduction(old, new).astype(new.dtype),
                    self.thread,
                    logging_info=self.logging_info,
                )
        self.post_write(tma_thread_id, shared)


_REDUCE_LOCK = threading.Lock()


@gpu_callbacks.fail_on_exception
def _copy_smem_to_gmem(token, mesh_location, thread, args, source_info, reduction):
    (src, src_access), (dst, dst_access) = (_access(*ref) for ref in args)
    shared = gpu_callbacks._get_shared_memory()
    task = _ReducingCopy(
        mesh_location=mesh_location,
        thread=thread,
        src_allocation_key=src,
        src_access=src_access,
        dst_allocation_key=dst,
        dst_access=dst_access,
        source_info=source_info,
        clock=shared.incr_clock(thread) if shared.detect_races else None,
    )
    task.reduction = None if reduction is None else _REDUCE[reduction]
    shared.execute_async_task(task)
    return token


def _interpret_copy_out(self, eqn, token, src, dst, *flat, **params):
    reduction = params["reduction_op"]
    if reduction is None and not params["has_user_predicate"]:
        return _copy_out(self, eqn, token, src, dst, *flat, **params)
    flat, predicate = (flat[:-1], flat[-1]) if params["has_user_predicate"] else (flat, True)
    trees = jax.tree_util.treedef_tuple((params["src_transforms_treedef"], params["dst_transforms_treedef"]))
    src_transforms, dst_transforms = jax.tree.unflatten(trees, flat)
    refs = (
        jaxpr_interpret.resolve_ref(eqn.invars[0].aval, src, src_transforms),
        jaxpr_interpret.resolve_ref(eqn.invars[1].aval, dst, dst_transforms),
    )
    copy = functools.partial(_io_callback, self, eqn, _copy_smem_to_gmem, reduction=reduction)
    return jax.lax.cond(predicate, lambda t: copy(t, *refs), lambda t: t, token), []


# primitives that upstream does not know: run_state, accumulator stores, atomic stores


def _allocate_registers(self, eqn, token, value):
    token, request = gpu_callbacks.call_make_allocation_request_array(
        token=token,
        compute_unit=self.thread,
        memory_space_id=memory.get_memory_space_idx(gpu_core.MemorySpace.REGS),
        initial_ref_count=1,
    )
    return gpu_callbacks.call_allocate_buffer(
        token=token,
        mesh_location=self.mesh_location,
        thread=self.thread,
        allocation_request_as_array=request,
        value=value,
        source_info=eqn.source_info,
    )


def _interpret_run_state(self, eqn, token, invals):
    if not all(eqn.params["is_initialized"]):
        raise NotImplementedError("run_state with an uninitialized ref")
    keys, owned = [], []
    for var, value in zip(eqn.invars, invals, strict=True):
        own = not isinstance(var.aval, state_types.AbstractRef)
        if own:
            token, value = _allocate_registers(self, eqn, token, value)
        keys.append(value)
        owned.append(own)
    token, _ = self.interpret(eqn.params["jaxpr"], token, *keys)
    outs = []
    for key, own, var in zip(keys, owned, eqn.outvars, strict=True):
        if own:
            token, out = _io_callback(self, eqn, _read_registers, token, key, result=(_TOKEN, _shape(var.aval)))
            token = gpu_callbacks.call_deallocate_buffer(
                token=token,
                mesh_location=self.mesh_location,
                thread=self.thread,
                allocation_key_as_array=key,
                source_info=eqn.source_info,
            )
        else:
            out = key
        outs.append(out)
    return token, outs


def _shape(aval):
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


@gpu_callbacks.fail_on_exception
def _read_registers(token, mesh_location, thread, args, source_info):
    key, access = _access(args[0], ())
    log = memory.GPULoggingInfo(mesh_location, thread, source_info)
    value, _, _ = gpu_callbacks._get_shared_memory().get_buffer_content(key, access, thread, logging_info=log)
    return token, value


@gpu_callbacks.fail_on_exception
def _write_registers(token, mesh_location, thread, args, source_info):
    key, access = _access(args[0], ())
    log = memory.GPULoggingInfo(mesh_location, thread, source_info)
    shared = gpu_callbacks._get_shared_memory()
    shared.store_buffer_content(key, access, np.asarray(args[1]), thread, logging_info=log)
    return token


def _interpret_accumulator_store(self, eqn, token, invals):
    acc, value = invals
    token = _io_callback(self, eqn, _write_registers, token, acc, value)
    return token, [value]


@gpu_callbacks.fail_on_exception
def _atomic_store(token, mesh_location, thread, args, source_info, operation):
    ref, value = args
    key, access = _access(*ref)
    log = memory.GPULoggingInfo(mesh_location, thread, source_info)
    shared = gpu_callbacks._get_shared_memory()
    with _REDUCE_LOCK:
        old, _, _ = shared.get_buffer_content(key, access, thread, logging_info=log)
        if old is None or old.shape != np.shape(value):
            raise IndexError(f"out-of-bounds atomic store to {key}: [{access}]")
        new = _REDUCE[operation](old, np.asarray(value)).astype(old.dtype)
        shared.store_buffer_content(key, access, new, thread, logging_info=log)
    return token


def _interpret_atomic_store(self, eqn, token, invals):
    ref, transforms, value = jax.tree.unflatten(eqn.params["args_tree"], invals)
    ref = jaxpr_interpret.resolve_ref(eqn.invars[0].aval, ref, transforms or ())
    operation = eqn.params["atomic_type"].value
    return _io_callback(self, eqn, _atomic_store, token, ref, value, operation=operation), []


_ADDED = {
    discharge.run_state_p: _interpret_run_state,
    gpu_primitives.wgmma_accumulator_store_p: _interpret_accumulator_store,
    gpu_primitives.atomic_store_p: _interpret_atomic_store,
}


def _interpret_with_additions(self, jaxpr, token, *args):
    """Interpret equations of `_ADDED` here, and the runs of equations between them by upstream's interpreter."""
    if not any(eqn.primitive in _ADDED for eqn in jaxpr.eqns):
        return _interpret(self, jaxpr, token, *args)
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], args, strict=True))

    def read(var):
        return var.val if isinstance(var, jax_core.Literal) else env[var]

    def run(eqns, token):
        made = [v for eqn in eqns for v in eqn.outvars if not isinstance(v, jax_core.DropVar)]
        needed = [v for eqn in eqns for v in eqn.invars if not isinstance(v, jax_core.Literal) and v in env]
        needed = list(dict.fromkeys(needed))
        names = jax_core.DebugInfo("interpreted", "interpreted", None, None)
        part = jaxpr.replace(constvars=[], invars=needed, outvars=made, eqns=eqns, debug_info=names)
        token, outs = _interpret(self, part, token, *map(read, needed))
        env.update(zip(made, outs, strict=True))
        return token

    plain = []
    for eqn in jaxpr.eqns:
        if eqn.primitive not in _ADDED:
            plain.append(eqn)
            continue
        token, plain = run(plain, token), []
        token, outs = _ADDED[eqn.primitive](self, eqn, token, [read(v) for v in eqn.invars])
        env.update(zip(eqn.outvars, outs, strict=True))
    token = run(plain, token)
    return token, [read(v) for v in jaxpr.outvars]


@contextlib.contextmanager
def filled_gaps():
    """Extend the interpreter by this module's additions inside the block.  Yields the list that each kernel's race detector is put on."""
    detectors = []

    def detector(**kwargs):
        # upstream keeps the last kernel's only
        detectors.append(_Detector(**kwargs))
        return detectors[-1]

    patches = {
        "interpret": _interpret_with_additions,
        "_interpret_wgmma_ref_p": _interpret_wgmma,
        "_interpret_copy_smem_to_gmem_p": _interpret_copy_out,
    }
    old = {name: getattr(_Interpreter, name) for name in patches}
    for name, function in patches.items():
        setattr(_Interpreter, name, function)
    gpu_callbacks.GPURaceDetectionState = detector
    try:
        yield detectors
    finally:
        gpu_callbacks.GPURaceDetectionState = _Detector
        for name, function in old.items():
            setattr(_Interpreter, name, function)


def _abort_deadlock(seconds):
    """Wake the interpreter's threads with an error; they wait for barriers that nobody completes."""
    with contextlib.suppress(Exception):
        gpu_callbacks._get_shared_memory().set_failed(
            TimeoutError(f"the kernel did not end within {seconds:.0f} s: a deadlock?"), None, top_level=False
        )


def interpreted(fn, *, seconds: float = SECONDS):
    """Interpret every Mosaic GPU kernel of `fn` on the CPU: NaN in uninitialised memory, reads out of bounds raise.

    Shared memory is uninitialised too, so a value that was never written shows as NaN in the result.  A kernel that does not end within
    `seconds` raises.  Compiled afresh every call: a program of another call is not reused.

    Raises:
      AssertionError: two threads race (the interpreter prints which accesses), or no kernel ran.
    """

    def run(*args, **kwargs):
        watch = threading.Timer(seconds, _abort_deadlock, [seconds])
        watch.daemon = True
        try:
            with filled_gaps() as detectors, force_gpu_interpret_mode(PARAMS):
                watch.start()
                out = jax.block_until_ready(jax.jit(lambda *a: fn(*a, **kwargs))(*args))
            # all of the test's later work on `out` is outside of the interpreter
            out = jax.tree.map(jnp.asarray, out)
            if not detectors:
                raise AssertionError("no Mosaic GPU kernel ran")
            if any(d.races_found for d in detectors):
                raise AssertionError("the race detector found a race; see what it printed")
            return out
        finally:
            watch.cancel()
            gpu_callbacks.reset_gpu_interpret_mode_state()

    return run
