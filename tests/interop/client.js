// A client in another language, generated at run time from the files in protos/.
//
//     NODE_PATH=.../node_modules node client.js PROTOS ADDRESS
//
// Prints one JSON object: what the server answered.
"use strict";

const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");

const [protos, address] = process.argv.slice(2);
const deadline = () => new Date(Date.now() + 10000);
const OBS = [0.5, -1, 0.25, 2];

function load(file) {
  const options = { includeDirs: [protos], keepCase: true, longs: String, enums: String, defaults: true };
  return grpc.loadPackageDefinition(loader.loadSync(file, options));
}

function call(client, method, request) {
  return new Promise((resolve, reject) => {
    client[method](request, { deadline: deadline() }, (error, answer) => (error ? reject(error) : resolve(answer)));
  });
}

// The answers of a stream to which all requests are sent at once.
function stream(client, method, requests) {
  return new Promise((resolve, reject) => {
    const answers = [];
    const duplex = client[method]({ deadline: deadline() });
    duplex.on("data", (answer) => answers.push(answer));
    duplex.on("error", reject);
    duplex.on("end", () => resolve(answers));
    requests.forEach((request) => duplex.write(request));
    duplex.end();
  });
}

const floats = (bytes) => Array.from({ length: bytes.length / 4 }, (_, i) => bytes.readFloatLE(4 * i));
const raw = (numbers) => Buffer.from(Float32Array.from(numbers).buffer);

async function inference() {
  const { GRPCInferenceService } = load("inference/oip.proto").inference;
  const client = new GRPCInferenceService(address, grpc.credentials.createInsecure());
  const request = {
    model_name: "tiny",
    id: "step 1",
    parameters: { seed: { uint64_param: "18446744073709551615" } },
    inputs: [{ name: "obs", datatype: "FP32", shape: [1, 4] }],
    raw_input_contents: [raw(OBS)],
  };
  const typed = {
    ...request,
    inputs: [{ ...request.inputs[0], contents: { fp32_contents: OBS } }],
    raw_input_contents: [],
  };
  const answer = await call(client, "ModelInfer", request);
  const streamed = await stream(client, "ModelStreamInfer", [typed, { ...request, model_name: "nope" }]);
  const refused = await call(client, "ModelInfer", { ...request, model_name: "nope" }).catch((error) => error);
  const metadata = await call(client, "ModelMetadata", { name: "tiny" });
  client.close();
  return {
    id: answer.id,
    version: answer.model_version,
    outputs: answer.outputs.map((output) => output.name),
    action: floats(answer.raw_output_contents[0]),
    seed: answer.parameters.seed.uint64_param,
    streamed: floats(streamed[0].infer_response.raw_output_contents[0]),
    error: streamed[1].error_message,
    status: grpc.status[refused.code],
    shapes: Object.fromEntries(metadata.inputs.map((input) => [input.name, input.shape])),
  };
}

async function policy() {
  const { PolicyService } = load("rsm/v1/policy.proto").rsm.v1;
  const client = new PolicyService(address, grpc.credentials.createInsecure());
  const request = { policy: "tiny", request_id: "7", rows: 1, obs: raw(OBS), seeds: ["18446744073709551615"] };
  const spec = await call(client, "GetSpec", { policy: "tiny" });
  const answer = await call(client, "Act", request);
  const streamed = await stream(client, "ActStream", [request, { ...request, request_id: "8", rows: 2 }]);
  client.close();
  return {
    environment: JSON.parse(spec.spec_json).env_id,
    action: floats(answer.action),
    ids: streamed.map((one) => one.request_id),
    error: streamed[1].error.code,
  };
}

(async () => console.log(JSON.stringify({ inference: await inference(), policy: await policy() })))().catch(
  (error) => {
    console.error(error);
    process.exit(1);
  },
);
