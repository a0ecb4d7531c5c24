"""A server in this process that answers as vLLM's does, from a model of transformers. It can be told to fail."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from safetensors.torch import load_file


class FakeServer:
    """
    Args:
        model: Model to score with.
        tokenizer: Its tokenizer.
        faults: What happens to the next requests to score: a status to answer with, "break" the connection, or "stall"
            (no answer until the server is closed).
    """

    def __init__(self, model, tokenizer, max_model_len=4096, logprobs_mode="processed_logprobs", max_logprobs=100):
        self.model, self.tokenizer, self.max_model_len = model.eval(), tokenizer, max_model_len
        self.max_logprobs = max_logprobs
        self.info = {"model": model.name_or_path, "revision": None, "logprobs_mode": logprobs_mode}
        self.instance = "first"
        self.faults = []
        self.lora_config = None
        self.adapters = []  # what is loaded, and the prefix cache that is forgotten
        self.num_requests = 0
        self.lock = threading.Lock()
        self.closed = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.answer(*server.get(self.path.split("?")[0]))

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "null")
                self.answer(*server.post(self.path, body))

            def answer(self, status, body):
                if status is None:
                    self.close_connection = True
                    return
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 64  # as many as ask at once

        self.http = Server(("127.0.0.1", 0), Handler)
        self.http.handle_error = lambda *args: None  # clients that gave up waiting
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def close(self):
        self.closed.set()
        self.http.shutdown()
        self.http.server_close()

    def get(self, path):
        if path == "/v1/models":
            return 200, {"data": [{"id": "served", "max_model_len": self.max_model_len}]}
        if path == "/server_info":
            info = {"instance_id": self.instance, "model_config": self.info, "lora_config": self.lora_config}
            return 200, {"vllm_config": {**info, "parallel_config": {"data_parallel_size": 1}}}
        return 200, {}

    def post(self, path, body):
        if path == "/tokenize":
            assert body["add_special_tokens"] is False
            return 200, {"tokens": self.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]}
        with self.lock:
            self.num_requests += 1
            fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, int):
            return fault, {"error": "told to fail"}
        if path in ("/v1/load_lora_adapter", "/reset_prefix_cache"):
            self.adapters.append(load_file(f"{body['lora_path']}/adapter_model.safetensors") if body else "forgotten")
            return 200, "done"
        if fault == "stall":
            self.closed.wait()
        if fault is not None:
            return None, {}
        if body["prompt_logprobs"] > self.max_logprobs:
            return 400, {"error": f"at most {self.max_logprobs} logprobs"}
        return 200, {"choices": [self.score(ids, body["prompt_logprobs"]) for ids in body["prompt"]]}

    def score(self, ids, top_k):
        assert len(ids) < self.max_model_len
        with torch.no_grad():
            logits = self.model(torch.tensor([ids], device=self.model.device)).logits[0].float()
        scores = logits if self.info["logprobs_mode"] == "raw_logits" else logits.log_softmax(-1)
        positions = [None]
        for log_p, token in zip(scores, ids[1:], strict=False):
            ranks = log_p.argsort(descending=True).argsort()
            top = {*log_p.topk(top_k).indices.tolist(), token}
            positions.append({str(t): {"logprob": log_p[t].item(), "rank": ranks[t].item() + 1} for t in top})
        return {"prompt_logprobs": positions}
