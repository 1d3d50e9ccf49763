// The last request as code that does the same from elsewhere.

const shell = (text) => `'${text.replaceAll("'", "'\\''")}'`;
const python = (text) => JSON.stringify(text);

export function curl(last, base, withKey) {
  const lines = [`curl -s ${shell(base + last.path)}`];
  if (withKey) lines.push(`-H "Authorization: Bearer $BLIP2_API_KEY"`);
  lines.push(`-F ${shell(`image=@${last.file}`)}`);
  for (const [name, value] of Object.entries(last.fields)) lines.push(`--form-string ${shell(`${name}=${value}`)}`);
  return lines.join(" \\\n  ");
}

export function pythonCode(last, base, withKey) {
  const fields = Object.entries(last.fields)
    .map(([name, value]) => `        ${python(name)}: ${typeof value === "number" ? value : python(String(value))},`)
    .join("\n");
  const headers = withKey ? `\n    headers={"Authorization": f"Bearer {os.environ['BLIP2_API_KEY']}"},` : "";
  const kind = last.path === "ask" ? "answers" : "captions";
  return `${withKey ? "import os\n\n" : ""}import requests

answer = requests.post(
    ${python(base + last.path)},${headers}
    files={"image": open(${python(last.file)}, "rb")},
    data={
${fields}
    },
)
answer.raise_for_status()
for text in answer.json()[${python(kind)}]:
    print(text["score"], text["text"])
`;
}
