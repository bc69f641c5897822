// The official Node client against the server at BASE_URL: prints one JSON line of what it saw.
import OpenAI from "openai";

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

const wrongKey = new OpenAI({ baseURL: `${process.env.BASE_URL}/v1`, apiKey: "sk-wrong", maxRetries: 0 });
console.log(
  JSON.stringify({
    vectors: plain.data.data.map((item) => item.embedding),
    model: plain.data.model,
    usage: plain.data.usage,
    timing: plain.response.headers.get("server-timing"),
    narrow: narrow.data[0].embedding,
    models,
    other: other.id,
    badWidth: await refusal(() => client.embeddings.create({ model: "mini", input: "a", dimensions: 5 })),
    noModel: await refusal(() => client.embeddings.create({ model: "nothing", input: "a" })),
    badKey: await refusal(() => wrongKey.models.list()),
  }),
);
