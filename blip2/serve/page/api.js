// The page's requests to the server. Every error thrown here is a sentence that a person can read.

let key = "";

export class Trouble extends Error {}

export const hasKey = () => key !== "";

async function askForKey() {
  const dialog = document.getElementById("key-dialog");
  const field = document.getElementById("key");
  field.value = "";
  dialog.returnValue = "no";
  dialog.showModal();
  await new Promise((done) => dialog.addEventListener("close", done, { once: true }));
  if (dialog.returnValue !== "yes" || field.value === "") {
    throw new Trouble("This server needs an API key, and none was given.");
  }
  key = field.value.trim();
  field.value = "";
}

async function request(path, options) {
  for (;;) {
    const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
    let response;
    try {
      response = await fetch(path, { ...options, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Trouble("The server cannot be reached. It may have been stopped.");
    }
    if (response.ok) return response;
    if (response.status === 401) {
      key = "";
      await askForKey();
      continue;
    }
    throw new Trouble(await reason(response));
  }
}

async function reason(response) {
  let message = "";
  try {
    message = (await response.json()).error.message;
  } catch {
    message = `it answered with status ${response.status}`;
  }
  if (response.status === 503) {
    const wait = response.headers.get("retry-after");
    return `The server is busy${wait ? `; try again in ${wait} s` : ""}: ${message}.`;
  }
  if (response.status >= 500) return `The server failed: ${message}.`;
  return `That did not work: ${message}.`;
}

// A picture and fields, as a form; what is null is left out.
export async function post(path, image, fields, signal) {
  const form = new FormData();
  form.append("image", image, image.name || "picture");
  for (const [name, value] of Object.entries(fields)) if (value !== null) form.append(name, value);
  return await read(await request(path, { method: "POST", body: form, signal }));
}

// The same in JSON, where fields may hold more than a form can.
export async function postJson(path, fields, signal) {
  const headers = { "Content-Type": "application/json" };
  return await read(await request(path, { method: "POST", headers, body: JSON.stringify(fields), signal }));
}

async function read(response) {
  try {
    return await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Trouble("The server went away before its answer was complete.");
  }
}

export async function modelName() {
  const response = await request("v1/models", { headers: { Accept: "application/json" } });
  return (await response.json()).data[0].id;
}

// A conversation's next answer, piece by piece.
export async function* chat(model, messages, options, signal) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ model, messages, stream: true, ...options }),
    signal,
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Trouble("The server went away in the middle of the answer.");
    }
    if (part.done) throw new Trouble("The server went away in the middle of the answer.");
    const lines = (rest + part.value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      const data = line.slice(6).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Trouble(`The answer broke off: ${event.error.message}.`);
      const piece = event.choices[0]?.delta?.content;
      if (piece) yield piece;
    }
  }
}

export function dataUrl(file) {
  return new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = () => failed(new Trouble("The file cannot be read. It may have been moved."));
    reader.readAsDataURL(file);
  });
}
