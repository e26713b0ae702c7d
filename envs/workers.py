"""Gymnasium environments in separate processes, which end when the training process ends.

    envs = Workers([functools.partial(gymnasium.make, "envs.memorymaze:MemoryMaze-9x9-v0")] * 16)

Each worker imports the module before the colon, which registers the environment.
"""

import atexit
import contextlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import queue
import signal
import sys
import threading
import time
import traceback
import types
import weakref
from collections.abc import Callable, Sequence

import gymnasium
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from gymnasium.vector.utils import write_to_shared_memory

LEFT_TO_PARENT = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1}  # those that a script's `train` notes
GRACE = 5.0  # seconds until workers that were asked to end are killed, and for the report of one that failed


class WorkerDied(RuntimeError):
    """A worker's process ended without having been asked to."""


class WorkerFailed(RuntimeError):
    """An exception in a worker; its traceback is the note."""


class Workers(AsyncVectorEnv):
    """AsyncVectorEnv for long runs: spawned processes, shared memory, and a new episode in the step that ends one.

    That step returns the new episode's first observation. The last observation and info of the old episode are in
    info["final_obs"] and info["final_info"] (AutoresetMode.SAME_STEP).

    A worker ends with its parent, however that ends, and leaves the signals LEFT_TO_PARENT to it. If a worker has died,
    any method raises WorkerDied; if an environment raised an exception, WorkerFailed. Both say in one sentence which
    worker and why. After either, only close() can be called. If a worker never answers, methods wait for it forever.
    """

    def __init__(self, env_fns: Sequence[Callable[[], gymnasium.Env]]):
        self.failure = None
        self._starting = contextlib.ExitStack()
        # Must run before multiprocessing's exit handler, which sends SIGTERM (workers ignore it), then waits forever.
        atexit.register(_close, weakref.ref(self))
        try:
            with self._starting:
                self._prepare_start()
                super().__init__(env_fns, context="spawn", autoreset_mode=AutoresetMode.SAME_STEP, worker=_work)
        except BaseException:
            self.close(terminate=True)
            raise

    def _prepare_start(self):
        """Changes what processes inherit, until _starting is closed."""
        # A spawned process imports the program's main module again, and with it JAX: seconds and hundreds of megabytes
        # for each worker. So give it a main module without a file.
        self._set(sys.modules, "__main__", types.ModuleType("__main__"))
        # Libraries start threads for all cores when they are loaded. A worker should use one.
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            self._set(os.environ, name, os.environ.get(name, "1"))
        # Ctrl-C and a closed terminal signal all of its processes, a scheduler often all of a job. The parent may have
        # something to finish, so its workers ignore these signals from the start.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, LEFT_TO_PARENT)
        self._starting.callback(signal.pthread_sigmask, signal.SIG_SETMASK, before)
        # The first worker would start multiprocessing's resource tracker, which unblocks SIGINT and SIGTERM here.
        multiprocessing.resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, LEFT_TO_PARENT)

    def _set(self, mapping, key, value):
        # Not mock.patch.dict: that would also take back what others, such as imports, change meanwhile.
        undo = (mapping.__setitem__, key, mapping[key]) if key in mapping else (mapping.pop, key)
        self._starting.callback(*undo)
        mapping[key] = value

    def _check_spaces(self):  # AsyncVectorEnv.__init__ calls this last, when all workers have been started
        self._starting.close()
        with self._watching():
            super()._check_spaces()

    @contextlib.contextmanager
    def _watching(self):
        if self.failure:
            self._raise_failure()
        try:
            yield
        except (EOFError, OSError):  # a pipe without a worker
            self._raise_dead()

    def _raise_dead(self):
        ended = multiprocessing.connection.wait([process.sentinel for process in self.processes], GRACE)
        sentence = "; ".join(_describe_exit(i, x) for i, x in enumerate(self.processes) if x.sentinel in ended)
        self.failure = WorkerDied, sentence or "The pipe to a worker broke, though all of them run", None
        self._raise_failure()

    def _raise_failure(self):
        kind, sentence, trace = self.failure
        error = kind(sentence)
        if trace:
            error.add_note(trace)
        raise error from None

    def _raise_if_errors(self, successes):
        if all(successes):
            return
        try:
            index, sentence, trace = self.error_queue.get(timeout=GRACE)
        except queue.Empty:  # killed before it could tell
            self._raise_dead()
        sentence = f"Worker {index} (process {self.processes[index].pid}) failed: {sentence}"
        self.failure = WorkerFailed, sentence, trace
        self._raise_failure()

    def reset_async(self, seed=None, options=None):
        with self._watching():
            super().reset_async(seed, options)

    def reset_wait(self, timeout=None):
        with self._watching():
            return super().reset_wait(timeout)

    def step_async(self, actions):
        with self._watching():
            super().step_async(actions)

    def step_wait(self, timeout=None):
        with self._watching():
            return super().step_wait(timeout)

    def call_async(self, name, /, *args, **kwargs):
        with self._watching():
            super().call_async(name, *args, **kwargs)

    def call_wait(self, timeout=None):
        with self._watching():
            return super().call_wait(timeout)

    def set_attr(self, name, values):
        with self._watching():
            super().set_attr(name, values)

    def close_extras(self, timeout: float | None = None, terminate: bool = False):
        """Asks the workers to end. Kills those that have not after `timeout` seconds (default GRACE), or at once."""
        for pipe in getattr(self, "parent_pipes", []):
            pipe.close()  # the worker's _receive then returns None, and it ends
        processes = [process for process in getattr(self, "processes", []) if process.pid is not None]
        deadline = time.monotonic() + (0 if terminate else GRACE if timeout is None else timeout)
        for process in processes:
            process.join(max(0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()


def _close(workers: weakref.ref):
    if envs := workers():
        envs.close(terminate=True)


def _describe_exit(index: int, process) -> str:
    process.join()  # its exit code comes a moment after its pipes are closed
    code = process.exitcode
    reason = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return f"Worker {index} (process {process.pid}) {reason}"


def _work(index, env_fn, pipe, parent_pipe, shared_memory, error_queue, autoreset_mode, semaphore):
    """The main function of a worker: the part of AsyncVectorEnv's protocol that Workers uses."""
    for number in LEFT_TO_PARENT:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    parent_pipe.close()
    env = None
    try:
        env = env_fn()
        while message := _receive(pipe):
            answer = _answer(env, index, shared_memory, *message)
            with contextlib.suppress(OSError):  # the parent is gone, and _receive will return None
                pipe.send((answer, True))
    except BaseException as error:
        sentence = " ".join(f"{type(error).__name__}: {error}".split())
        error_queue.put((index, sentence, traceback.format_exc()))  # as text: not every exception can be pickled
        with contextlib.suppress(OSError):
            pipe.send((None, False))
        while _receive(pipe):  # keeps the pipe open, so that the parent gets the exception and not a broken pipe
            pass
    finally:
        if env is not None:
            env.close()


def _receive(pipe):
    """-> command and data, or None if the parent has closed its end"""
    try:
        return pipe.recv()
    except (EOFError, OSError):
        return None


def _answer(env, index, shared_memory, command, data):
    if command == "reset":
        obs, info = env.reset(**data)
        write_to_shared_memory(env.observation_space, index, obs, shared_memory)
        return None, info
    if command == "step":
        obs, reward, terminated, truncated, info = env.step(data)
        if terminated or truncated:
            first_obs, first_info = env.reset()
            obs, info = first_obs, {"final_info": info, "final_obs": obs} | first_info
        write_to_shared_memory(env.observation_space, index, obs, shared_memory)
        return None, reward, terminated, truncated, info
    if command == "_call":
        name, args, kwargs = data
        attribute = env.get_wrapper_attr(name)
        return attribute(*args, **kwargs) if callable(attribute) else attribute
    if command == "_setattr":
        return env.set_wrapper_attr(*data)
    if command == "_check_spaces":
        _, obs_space, action_space = data
        return obs_space == env.observation_space, action_space == env.action_space
    raise ValueError(f"unknown command {command}")


def _end_with_parent():
    """In a separate thread: waits until the parent has ended, then kills this process.

    The sentinel is a pipe to the parent. If the parent forked, other children may keep it open, hence getppid.
    """
    parent = multiprocessing.parent_process()
    while os.getppid() == parent.pid and not multiprocessing.connection.wait([parent.sentinel], 1.0):
        pass
    os.kill(os.getpid(), signal.SIGKILL)
