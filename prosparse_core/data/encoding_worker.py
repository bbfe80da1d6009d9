"""One of the processes that tokenize, as a program: takes pickled batches of documents, gives arrays in their order.

``python -m prosparse_core.data.encoding_worker PARENT``. First comes where the tokenizer lies, and what is held out.
"""

from __future__ import annotations

import os
import pickle
import queue
import sys
import threading
from pathlib import Path
from typing import IO, Any

from prosparse_core.distributed.lifeline import end_with_parent


def main(parent: int) -> None:
    end_with_parent(parent)
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    batches: queue.SimpleQueue[Any] = queue.SimpleQueue()
    # Read at once, so that the other side never waits to send while this one waits to answer.
    sys.modules["torch"] = None  # type: ignore[assignment]  # tokenizers need nothing of it, and its import takes most
    threading.Thread(target=_read, args=(sys.stdin.buffer, batches), daemon=True).start()

    from prosparse_core.data.encoding import encode_batch
    from prosparse_core.data.held_out import HeldOut
    from prosparse_core.data.packing import Encoder
    from prosparse_core.distributed.trainer import failure
    from prosparse_core.variants import load_tokenizer

    folder, held_out = batches.get()
    try:
        encoder, kept_out = Encoder(load_tokenizer(Path(folder))), HeldOut.from_plain(held_out)
        answer: object = None
    except Exception as error:
        answer = failure(error)
    while True:
        pickle.dump(answer, out, protocol=pickle.HIGHEST_PROTOCOL)
        out.flush()
        documents = batches.get()
        if documents is None:
            return
        try:
            answer = encode_batch(encoder, kept_out, documents)
        except Exception as error:
            answer = failure(error)


def _read(source: IO[bytes], batches: queue.SimpleQueue[Any]) -> None:
    while True:
        try:
            batches.put(pickle.load(source))
        except EOFError:
            batches.put(None)
            return


if __name__ == "__main__":
    main(int(sys.argv[1]))
