// The official Node client against the server at BASE_URL: prints one JSON line of what it saw.
import OpenAI, { toFile } from "openai";

const client = new OpenAI({ baseURL: `${process.env.BASE_URL}/v1`, apiKey: process.env.API_KEY, maxRetries: 0 });
const texts = ["the first text", "another one"];

const plain = await client.embeddings.create({ model: "text-embedding-3-small", input: texts }).withResponse();
const narrow = await client.embeddings.create({ model: "mini", input: "a b", dimensions: 4, encoding_format: "float" });
const models = [];
for await (const model of client.models.list()) models.push(model.id);
const other = await client.models.retrieve("org/other");

async function refusal(call) {
  try {
    await call();
    return null;
  } catch (error) {
    return { kind: error.constructor.name, status: error.status, code: error.code, param: error.param };
  }
}

const lines = texts.map((input, index) =>
  JSON.stringify({ custom_id: `${index}`, method: "POST", url: "/v1/embeddings", body: { model: "mini", input } }),
);
const file = await client.files.create({
  file: await toFile(Buffer.from(lines.join("\n")), "corpus.jsonl"),
  purpose: "batch",
});
let batch = await client.batches.create({
  input_file_id: file.id,
  endpoint: "/v1/embeddings",
  completion_window: "24h",
});
while (["validating", "in_progress", "finalizing"].includes(batch.status)) {
  await new Promise((resolve) => setTimeout(resolve, 20));
  batch = await client.batches.retrieve(batch.id);
}
const output = await (await client.files.content(batch.output_file_id)).text();
const listed = [];
for await (const found of client.batches.list({ limit: 1 })) listed.push(found.id);

async function run(rows, endpoint) {
  const content = await toFile(Buffer.from(rows.join("\n")), "rows.jsonl");
  const input = await client.files.create({ file: content, purpose: "batch" });
  return client.batches.create({ input_file_id: input.id, endpoint, completion_window: "24h" });
}

async function ended(made) {
  while (["validating", "in_progress", "finalizing", "cancelling"].includes(made.status)) {
    await new Promise((resolve) => setTimeout(resolve, 20));
    made = await client.batches.retrieve(made.id);
  }
  return made;
}

async function rowsOf(fileId) {
  const text = await (await client.files.content(fileId)).text();
  return text.trim().split("\n").map((row) => JSON.parse(row));
}

const bad = await ended(await run([lines[0], "{", lines[0]], "/v1/embeddings"));
const badRows = await rowsOf(bad.error_file_id);
const many = Array.from({ length: 3000 }, (_, index) => lines[0].replace('"0"', `"many-${index}"`));
const stopped = await run(many, "/v1/embeddings");
await client.batches.cancel(stopped.id);
const asked = performance.now();
const stoppedNow = await ended(stopped);
const stoppedMs = performance.now() - asked;
const files = [];
for await (const found of client.files.list({ purpose: "batch" })) files.push(found.id);

const wrongKey = new OpenAI({ baseURL: `${process.env.BASE_URL}/v1`, apiKey: "sk-wrong", maxRetries: 0 });
console.log(
  JSON.stringify({
    vectors: plain.data.data.map((item) => item.embedding),
    model: plain.data.model,
    usage: plain.data.usage,
    timing: plain.response.headers.get("server-timing"),
    narrow: narrow.data[0].embedding,
    models,
    batch,
    batchVectors: output.trim().split("\n").map((row) => JSON.parse(row).response.body.data[0].embedding),
    batchListed: listed.includes(batch.id),
    bad: { counts: bad.request_counts, errors: badRows.map((row) => [row.custom_id, row.error.code, row.response]) },
    stopped: {
      status: stoppedNow.status,
      completed: stoppedNow.request_counts.completed,
      ms: stoppedMs,
      rows: stoppedNow.output_file_id ? (await rowsOf(stoppedNow.output_file_id)).length : 0,
    },
    fileListed: files.includes(file.id),
    cancelled: await refusal(() => client.batches.cancel(batch.id)),
    other: other.id,
    badWidth: await refusal(() => client.embeddings.create({ model: "mini", input: "a", dimensions: 5 })),
    noModel: await refusal(() => client.embeddings.create({ model: "nothing", input: "a" })),
    badKey: await refusal(() => wrongKey.models.list()),
  }),
);
