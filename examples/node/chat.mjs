// Streams an answer: node chat.mjs "What is the capital of Japan?"
//
// LONGSPAN_URL names the server, https:// for TLS; LONGSPAN_TOKEN is shown to it.
import { Code, ConnectError, createClient } from "@connectrpc/connect";
import { createGrpcTransport } from "@connectrpc/connect-node";
import { InferenceService } from "./gen/longspan/v1/inference_pb.js";

const transport = createGrpcTransport({ baseUrl: process.env.LONGSPAN_URL ?? "http://127.0.0.1:50051" });
const client = createClient(InferenceService, transport);
const token = process.env.LONGSPAN_TOKEN;

const content = process.argv[2] ?? "What is the capital of Japan?";
const request = {
  prompt: { case: "chat", value: { messages: [{ role: "user", content }] } },
  sampling: { temperature: 0 },
  stop: { maxTokens: 40 },
};
// Ctrl-C cancels the call, and the server frees the request's pages at once.
const stop = new AbortController();
process.once("SIGINT", () => stop.abort());

try {
  const headers = token ? { authorization: `Bearer ${token}` } : {};
  for await (const { event } of client.streamGenerate({ request }, { headers, signal: stop.signal })) {
    if (event.case === "delta") process.stdout.write(event.value.text);
    if (event.case === "finished") console.log(`\n${event.value.usage.completionTokens} tokens`);
  }
} catch (error) {
  const { code, rawMessage } = ConnectError.from(error);
  if (code !== Code.Canceled) {
    console.error(`${Code[code]}: ${rawMessage}`);
    process.exitCode = 1;
  }
}
