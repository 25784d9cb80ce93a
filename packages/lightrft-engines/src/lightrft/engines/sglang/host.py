"""The process that owns SGLang's engine and its schedulers: ``python -m lightrft.engines.sglang.host DESCRIPTOR``.

SGLang expects to own its process: it forks or spawns, sets signal handlers that end the whole process tree, changes the
environment, and at its end kills all child processes. So it runs in this process, to which the trainer talks over a
socket: (method, arguments) in, ("done", value) or (kind of error, text) back. If the trainer ends, so does everything
here.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
import traceback
from collections.abc import Coroutine, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

_SECONDS_TO_IDLE = 60.0


class Host:
    """SGLang's engine, and the methods that the trainer can call."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._engine: Any = None
        self._session = False

    # ---- life -------------------------------------------------------------------------------------------------------
    def start(self, arguments: Mapping[str, Any]) -> None:
        """Start SGLang. :raises ValueError: it has no such option."""
        import sglang.srt.entrypoints.engine as entrypoint  # pyright: ignore[reportMissingImports]
        from sglang.srt.managers.load_snapshot import shm_path_for  # pyright: ignore[reportMissingImports]

        from . import sampler, scheduler

        sampler.register()  # so that the name is known where arguments are checked
        known = set(entrypoint.ServerArgs.__struct_fields__)
        if unknown := sorted(set(arguments) - known):
            raise ValueError(
                f'engine "sglang" has no option {", ".join(unknown)}; it has those of SGLang\'s ServerArgs'
            )
        if arguments["device"] == "cpu":
            # This process has no threads yet: forked schedulers need not import everything again.
            entrypoint.mp.set_start_method("fork", force=True)
            entrypoint.mp.set_start_method = _stay

        class Engine(entrypoint.Engine):
            """With our schedulers, and without a detokenizer, since no text is needed."""

            run_scheduler_process_func = staticmethod(scheduler.run)

            @classmethod
            def _launch_detokenizer_subprocesses(cls, *args: Any, **kwargs: Any) -> tuple[list[Any], list[str]]:
                return [], []

        self._engine = Engine(**arguments)
        # Mapped by now by all who use it, and nothing would remove it at the end, when the processes are killed: load
        # figures, for routers that we have not, and the queues of schedulers that share a model.
        for file in (Path(shm_path_for(self._engine.port_args.instance_id)), *_queues()):
            file.unlink(missing_ok=True)

    def stop(self) -> None:
        """End SGLang's processes."""
        if self._engine is not None:
            self._engine.shutdown()

    # ---- generation -------------------------------------------------------------------------------------------------
    def generate(
        self,
        input_ids: Sequence[Sequence[int]],
        sampling: Sequence[Mapping[str, Any]],
        images: Sequence[Mapping[str, Any] | None],
        seconds: float | None,
    ) -> list[Mapping[str, Any]]:
        """One answer per prompt. :raises TimeoutError: it took longer; all requests have been stopped."""
        return self._run(self._generate(input_ids, sampling, images, seconds))

    async def _generate(
        self,
        input_ids: Sequence[Sequence[int]],
        sampling: Sequence[Mapping[str, Any]],
        images: Sequence[Mapping[str, Any] | None],
        seconds: float | None,
    ) -> list[Mapping[str, Any]]:
        task = asyncio.ensure_future(
            self._engine.async_generate(
                input_ids=[list(ids) for ids in input_ids],
                sampling_params=[dict(each) for each in sampling],
                image_data=[None if each is None else [_tensors(each)] for each in images] if any(images) else None,
                return_logprob=True,
            )
        )
        done, _ = await asyncio.wait({task}, timeout=seconds)
        if not done:
            while not done:  # some may still be on their way to the scheduler
                self._engine.tokenizer_manager.abort_request(abort_all=True)
                done, _ = await asyncio.wait({task}, timeout=0.2)
            task.exception()  # on any error: nothing may be left running
            raise TimeoutError(f"{len(input_ids)} samples were not generated within {seconds:g} s")
        return list(task.result())

    # ---- weights ----------------------------------------------------------------------------------------------------
    def begin(self) -> None:
        """Open SGLang's weight update."""
        _check(self._engine.begin_weight_update())
        self._session = True

    def end(self) -> None:
        """Close it, and clear the results of the old weights."""
        if self._session:
            self._session = False
            _check(self._engine.end_weight_update())
            self.flush()

    def tell(self, messages: Sequence[str]) -> None:
        """Hand each scheduler its message (:func:`.scheduler.load`); they answer in the mailbox."""
        from sglang.srt.managers.io_struct import UpdateWeightsFromTensorReqInput  # pyright: ignore[reportMissingImports]
        from sglang.srt.utils import MultiprocessingSerializer  # pyright: ignore[reportMissingImports]

        from .options import WEIGHT_LOADER

        inside = self._session
        if not inside:
            _check(self._engine.begin_weight_update())
        request = UpdateWeightsFromTensorReqInput(
            serialized_named_tensors=[
                MultiprocessingSerializer.serialize([(message, torch.zeros(1))]) for message in messages
            ],
            load_format=WEIGHT_LOADER,
            flush_cache=False,
        )
        _check(self._run(self._engine.tokenizer_manager.update_weights_from_tensor(request, None)))
        if not inside:
            _check(self._engine.end_weight_update())

    def flush(self) -> None:
        """Clear the KV cache."""
        answer = self._run(self._flush())
        if not answer.success:
            raise RuntimeError("SGLang did not clear its cache: requests are still running")

    async def _flush(self) -> Any:
        """SGLang refuses it until the scheduler has removed the batch that it has just answered."""
        late = time.monotonic() + _SECONDS_TO_IDLE
        while not (answer := await self._engine.tokenizer_manager.flush_cache()).success and time.monotonic() < late:
            await asyncio.sleep(0.005)
        return answer

    # ---- memory, where SGLang has a sleep of its own -----------------------------------------------------------------
    def release(self, tag: str) -> None:
        """Free memory."""
        self._engine.release_memory_occupation([tag])

    def resume(self, tag: str) -> None:
        """Allocate it again."""
        self._engine.resume_memory_occupation([tag])

    # ---- the loop ---------------------------------------------------------------------------------------------------
    def serve(self) -> None:
        """Answer until the trainer sends ``stop`` or ends."""
        while True:
            try:
                method, arguments = self._connection.recv()
            except EOFError:
                return
            try:
                reply = ("done", getattr(self, method)(**arguments))
            except Exception as error:  # noqa: BLE001 - the trainer raises it
                traceback.print_exc()
                reply = (type(error).__name__, str(error))
            self._connection.send(reply)
            if method == "stop":
                return

    def _run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run to the end, or until the trainer ends, which sends nothing while it waits for an answer."""
        loop, socket = self._engine.loop, self._connection.fileno()
        loop.add_reader(socket, self._gone)
        try:
            return loop.run_until_complete(coroutine)
        finally:
            loop.remove_reader(socket)
            os.set_blocking(socket, True)  # which an event loop changes permanently

    def _gone(self) -> None:
        self.stop()
        os._exit(1)


def _queues() -> list[Path]:
    """Shared memory through which the processes that this one has started send each other requests."""
    family = psutil.Process().children(recursive=True)
    return [file for process in family for file in Path("/dev/shm").glob(f"sgl_shm_mq_{process.pid}_*")]


def _stay(*args: Any, **kwargs: Any) -> None:
    """SGLang sets another way to start processes."""


def _tensors(values: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays as tensors."""
    return {name: torch.from_numpy(each) if isinstance(each, np.ndarray) else each for name, each in values.items()}


def _check(answer: Any) -> None:
    """Raise where SGLang returns (False, reason). :raises RuntimeError: it did."""
    success, message = answer
    if not success:
        raise RuntimeError(message)


def _keep_from_children(descriptor: int) -> None:
    """The schedulers must not inherit the socket: the trainer notices this process's end by its closing."""
    mine = os.getpid()
    os.set_inheritable(descriptor, False)

    def close() -> None:
        if os.getppid() == mine:
            os.close(descriptor)

    os.register_at_fork(after_in_child=close)


def main(descriptor: str) -> None:
    """Serve over an inherited socket."""
    _keep_from_children(int(descriptor))
    host = Host(Connection(int(descriptor)))
    try:
        host.serve()
    finally:
        host.stop()


if __name__ == "__main__":
    main(sys.argv[1])
