"""The server from start to end: listen, load, serve, drain."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
from dataclasses import replace

from server.access.granted import Access, warn_of_open_metrics
from server.api.health import HealthServicer
from server.api.listen import Listener, Listening, Parts
from server.api.service import VERSION, InferenceServicer
from server.api.state import Served, ServerState
from server.background import for_other_loops, in_thread, when_stdin_ends
from server.closing import close
from server.engine.ipc.link import EngineClient
from server.engine.ipc.output import EngineDeadError
from server.engine.ipc.spare import Spare
from server.engine.ipc.spawn import Spawned
from server.errors import RefusedError
from server.keeping import keep_serving
from server.messages import Ready, StepOutput
from server.models.generation import read_generation
from server.models.resolve import ModelFiles, resolve_model
from server.observe import metrics_server
from server.observe.http_server import HttpServer
from server.observe.metrics import GrpcMetrics, Metrics
from server.observe.progress import StartProgress
from server.observe.tracing import Traces
from server.protocols.load import service_names, services
from server.ready_lines import ready_lines
from server.settings import Settings
from server.text.load import check_tokens, load_tokenizer

log = logging.getLogger("longspan.server")

_PROGRESS_SECONDS = 0.1
# The exit code that shells give a program that a signal ended.
_INTERRUPTED = 128 + signal.SIGINT


class Server:
    """One server of one model. ``run`` is its whole life.

    Args:
        settings: of the server.
        access: what they grant.
        spawned: what ``spawn_engine`` gave, if that was called already; it ends with the server.

    Attributes:
        state: its state now.
        port: of gRPC, once it listens.
        metrics_port: of ``/metrics``, once it listens.
        listens: makes what calls come from.
    """

    listens: type[Listening] = Listener

    def __init__(self, settings: Settings, access: Access, spawned: Spawned | None = None) -> None:
        self._settings = settings
        self._access = access
        self._spare = Spare(settings.threads, settings.cache_dir, spawned)
        self.state = ServerState(settings)
        self.port = 0
        self.metrics_port = 0
        self._metrics = Metrics()
        self._health = HealthServicer(service_names(settings.protocols))
        self._traces: Traces | None = None
        self._engine: EngineClient | None = None
        self._files: ModelFiles | None = None
        self._served: Served | None = None
        self._grpc: Listening | None = None
        self._http: HttpServer | None = None
        self._asked_to_stop = asyncio.Event()
        self._asked_to_end = asyncio.Event()
        self._interrupted = False

    async def run(self) -> int:
        """Serves until it is told to end, or can't go on.

        Returns:
            The exit code: 0 when it was told to end, 130 if by Ctrl-C before it was ready, 1 when the engine
            died.

        Raises:
            RefusedError: it can't serve with these settings.
        """
        try:
            await self._listen()
            serving = asyncio.create_task(self._serve())
            stop = asyncio.create_task(self._asked_to_stop.wait())
            await asyncio.wait({serving, stop}, return_when=asyncio.FIRST_COMPLETED)
            if not self._asked_to_stop.is_set():
                stop.cancel()
                log.error("%s", serving.result())
                return 1
            await self._drain()
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
            return _INTERRUPTED if self._interrupted and self.state.served is None else 0
        finally:
            await close(self._grpc, self._engine, self._spare, self._http, self._traces)

    def stop(self) -> None:
        """Begins to drain."""
        self.state.phase = "draining"
        self._health.set_ready(False)
        self._asked_to_stop.set()

    def _interrupt(self) -> None:
        """Begins to drain; the second time, ends at once. (A terminal that closes sends SIGHUP twice.)"""
        self._interrupted = True
        if self._asked_to_stop.is_set():
            self.end()
        else:
            self.stop()

    def end(self) -> None:
        """Ends at once, whatever is running."""
        self._asked_to_end.set()
        self.stop()

    def _abandon(self) -> None:
        """Ends at once: the program that started it has ended, and no reader of answers is left."""
        log.warning("standard input has ended, and so does this server (--end-with-stdin)")
        self.end()

    async def _listen(self) -> None:
        settings, access = self._settings, self._access
        self._take_signals()
        access.begin()
        registry = self._metrics.registry
        if settings.metrics:
            tls, callers = access.metrics_certificates, access.callers
            self._http, self.metrics_port = metrics_server.listen(
                *(registry, settings.metrics_host, settings.metrics_port),
                ready=for_other_loops(lambda: self._health.ready),
                authorize=callers.may_read_metrics if settings.metrics_auth else None,
                tls=None if tls is None else tls.context,
            )
            warn_of_open_metrics(settings)
        if settings.otlp_endpoint is not None:
            self._traces = Traces(settings.otlp_endpoint, VERSION)
        service = InferenceServicer(self.state, self._metrics, self._traces)
        parts = Parts(
            host=settings.host,
            port=settings.port,
            state=self.state,
            service=service,
            health=self._health,
            metrics=GrpcMetrics(registry),
            callers=access.callers,
            certificates=access.certificates,
            others=services(settings.protocols, service),
        )
        self._grpc = self.listens(parts)
        await self._grpc.start()
        self.port = self._grpc.port

    def _take_signals(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, self._interrupt)
        loop.add_signal_handler(signal.SIGTERM, self.stop)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as it is under nohup
            loop.add_signal_handler(signal.SIGHUP, self.stop)
        if self._settings.end_with_stdin:
            when_stdin_ends(self._abandon)

    async def _serve(self) -> str:
        """Loads and serves, again after an engine's death where so configured.

        Returns:
            Why it can't go on, a sentence.
        """
        progress = StartProgress(self._tell_progress)
        try:
            settings, report = self._settings, progress.report
            files = await in_thread(
                lambda: resolve_model(
                    settings.model, settings.cache_dir, report, pickles=settings.allow_pickle
                )
            )
            name = settings.model_name or files.name
            self._metrics.name_model(name)
            progress.report("starting the engine", None)
            self._files = files
            engine = await self.start_engine()
            tokenizer, ready = await asyncio.gather(
                in_thread(
                    lambda: load_tokenizer(files.tokenizer, files.source, self._settings.chat_template)
                ),
                self._wait_ready(engine, progress),
            )
        except EngineDeadError as error:
            raise RefusedError(f"the engine did not start: {error}") from error
        finally:
            progress.close()
        check_tokens(tokenizer, ready.vocabulary_size, ready.longest_text)
        generation = read_generation(
            files.folder,
            ready,
            eos_token=tokenizer.eos_token,
            token_id=tokenizer.token_id,
            recommended=files.sampling if self._settings.generation_config == "auto" else None,
        )
        served = Served(name, files.source, tokenizer, engine, ready, generation)
        self._served = served
        await self._bound_messages(served)
        self.engine_ready(engine)
        if not self.draining:
            self._tell_ready(served)
        gc.collect()
        gc.freeze()  # loaded objects stay: later garbage collections need not visit them
        return await keep_serving(self, engine, self._settings)

    def _tell_ready(self, served: Served) -> None:
        print(ready_lines(served, self._settings, self.port, self.metrics_port), flush=True)

    async def _bound_messages(self, served: Served) -> None:
        """Has gRPC itself refuse what no request to this model can be, before it is ready."""
        assert self._grpc is not None
        before = self.state.received_bytes
        self.state.hold_to(served)
        if self.state.received_bytes != before and not self.draining:
            await self._grpc.renew()

    async def start_engine(self) -> EngineClient:
        """Starts an engine, which is not ready yet."""
        assert self._files is not None
        files = self._files
        engine = EngineClient(self._settings, files.folder, self._spare.take(), files.tokenizer)
        self._engine = engine
        engine.on_step = self._take_step
        self._metrics.step_age = lambda: engine.step_age
        await engine.start()
        return engine

    def _take_step(self, output: StepOutput) -> None:
        self._metrics.step(output)
        if output.kv_events and self.state.kv_log is not None:
            self.state.kv_log.add(output.kv_events)

    async def _wait_ready(self, engine: EngineClient, progress: StartProgress) -> Ready:
        waiting = asyncio.create_task(engine.wait_ready())
        try:
            while not waiting.done():
                if engine.progress is not None:
                    progress.report(engine.progress.stage, engine.progress.fraction)
                await asyncio.wait({waiting}, timeout=_PROGRESS_SECONDS)
            return waiting.result()
        finally:
            waiting.cancel()

    def _tell_progress(self, words: str) -> None:
        self.state.progress = words

    @property
    def draining(self) -> bool:
        """Whether the server ends, so that no other engine is to be started."""
        return self.state.phase == "draining"

    def engine_ready(self, engine: EngineClient) -> None:
        """Serves with an engine that is ready."""
        assert self._served is not None
        assert engine.ready is not None
        ready = engine.ready
        self._metrics.identify(
            ready, version=VERSION, weights=ready.weights, max_batch_tokens=ready.max_batch_tokens
        )
        if not self.draining:
            self.state.set_ready(replace(self._served, engine=engine, ready=ready))
            self._health.set_ready(True)
            if self._settings.on_engine_failure == "restart":
                self._spare.keep()

    def engine_failed(self, reason: str) -> None:
        """Refuses requests from now on; ``reason`` is a sentence."""
        self.state.failure = reason
        if not self.draining:
            self.state.phase = "dead"
        self._health.set_ready(False)
        self._metrics.engine_gone()
        if self.state.kv_log is not None:
            self.state.kv_log.clear()

    def engine_restarts(self, cause: str) -> None:
        """Counts another start; ``cause`` is ``died``, ``hung`` or ``not_ready``."""
        self._metrics.restarted(cause)

    async def _drain(self) -> None:
        """Running requests may finish for a while; then they are told that the server ends."""
        count = len(self.state.admission)
        if count:
            seconds = self._settings.drain_seconds
            log.info("waiting up to %.0f s for %d requests; Ctrl-C again ends them", seconds, count)
            waits = {
                asyncio.create_task(self.state.admission.wait_empty()),
                asyncio.create_task(self._asked_to_end.wait()),
            }
            await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()
        self.state.admission.fail_all(self.state.cut_off())
