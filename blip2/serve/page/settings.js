// The settings, read from their controls when a request is made.

const get = (id) => document.getElementById(id);
const number = (id) => Number(get(id).value);
const sampling = () => document.querySelector('input[name="way"]:checked').value === "sample";
const ALTERNATIVES = 4; // captions shown, the best one included

export function watch(changed) {
  for (const id of ["beams", "temperature", "length"]) {
    get(id).addEventListener("input", () => (get(`${id}-now`).value = get(id).value));
    get(id).addEventListener("change", changed);
  }
  for (const radio of document.querySelectorAll('input[name="way"]')) {
    radio.addEventListener("change", () => {
      get("beams-row").hidden = sampling();
      get("temperature-row").hidden = !sampling();
      changed();
    });
  }
}

export function captionFields() {
  const shared = { max_new_tokens: number("length") };
  if (sampling()) return { ...shared, do_sample: true, temperature: number("temperature"), num_return_sequences: ALTERNATIVES };
  return { ...shared, num_beams: number("beams"), num_return_sequences: Math.min(number("beams"), ALTERNATIVES) };
}

// A streamed answer is one text as it grows, so there is no beam search.
export function chatOptions() {
  const shared = { max_tokens: number("length") };
  return sampling() ? { ...shared, temperature: number("temperature") } : shared;
}

export function askFields() {
  const shared = { max_new_tokens: number("length") };
  return sampling() ? { ...shared, do_sample: true, temperature: number("temperature") } : { ...shared, num_beams: 1 };
}
