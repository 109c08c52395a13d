// Measures pairs of LiteRT files. What to do next comes from the command that serves this page, and each block goes
// there as soon as it is measured.
import {loadAndCompile, loadLiteRt, Tensor, unloadLiteRt} from '@litertjs/core';

const STEPS = 500; // of the clock: an inference that takes fewer is repeated within one timing
const WARMUP = 3; // runs of each side before the first block
const now = document.getElementById('now');
const sleep = ms => new Promise(resolve => setTimeout(resolve, ms));
let device = null; // the number that the command gives this page
let wasHidden = document.hidden; // since the block began

document.addEventListener('visibilitychange', () => {
  wasHidden ||= document.hidden;
  if (device !== null) post('status', {text: document.hidden ? 'the page is not in front' : 'the page is back in front'});
  if (!document.hidden) stayAwake();
});
addEventListener('pagehide', () => device !== null && navigator.sendBeacon('leave', JSON.stringify({device})));
addEventListener('pageshow', event => event.persisted && location.reload()); // it came back after it was left

class Refused extends Error {}

/** The answer of the command. It is asked again while the network is gone. */
async function post(name, value) {
  for (let failures = 0; ; failures++) {
    let answer;
    try {
      answer = await fetch(name, {method: 'POST', body: JSON.stringify({device, ...value})});
    } catch {
      if (failures > 2) show('Your computer does not answer. Has the command ended? Is the network the same?', true);
      await sleep(1000);
      continue;
    }
    if (answer.ok) return answer.json();
    throw new Refused(await answer.text());
  }
}

function show(text, isBad = false) {
  now.textContent = text;
  now.className = isBad ? 'bad' : '';
}

async function stayAwake() {
  try {
    await navigator.wakeLock.request('screen');
    return true;
  } catch {
    return false; // over plain HTTP there is none
  }
}

/** The smallest step of the clock, in milliseconds. */
function timerStep() {
  let step = Infinity;
  for (let i = 0; i < 20; i++) {
    const start = performance.now();
    let later = start;
    while (later === start) later = performance.now();
    step = Math.min(step, later - start);
  }
  return Number(step.toPrecision(3));
}

/** What the browser says of the device. */
async function facts() {
  const found = {
    user_agent: navigator.userAgent,
    touch_points: navigator.maxTouchPoints ?? 0,
    hardware_concurrency: navigator.hardwareConcurrency ?? null,
    device_memory: navigator.deviceMemory ?? null,
    secure_context: isSecureContext,
    cross_origin_isolated: crossOriginIsolated,
    timer_step_ms: timerStep(),
    model: null,
    platform: null,
    gpu: null,
  };
  try {
    const hints = await navigator.userAgentData.getHighEntropyValues(['model', 'platformVersion', 'architecture']);
    found.model = hints.model || null;
    found.platform = [hints.platform, hints.platformVersion, hints.architecture].filter(Boolean).join(' ') || null;
  } catch {} // few browsers have it, and none over plain HTTP
  try {
    const gl = document.createElement('canvas').getContext('webgl');
    found.gpu = gl.getParameter(gl.getExtension('WEBGL_debug_renderer_info').UNMASKED_RENDERER_WEBGL);
  } catch {}
  return found;
}

function list(found) {
  const table = document.getElementById('facts');
  for (const [name, value] of Object.entries(found)) {
    const row = table.insertRow();
    for (const text of [name.replaceAll('_', ' '), value ?? 'not reported']) row.insertCell().textContent = text;
  }
}

/** A part of the page for a pair: `says(text)`, `progress(share)`. */
function card(task) {
  const id = `pair${task.number}`;
  document.getElementById(id)?.remove();
  const item = document.createElement('li');
  item.id = id;
  const title = item.appendChild(document.createElement('h2'));
  title.textContent = task.title;
  const text = item.appendChild(document.createElement('p'));
  const bar = item.appendChild(document.createElement('progress'));
  document.getElementById('pairs').append(item);
  return {
    says: (words, isBad = false) => Object.assign(text, {textContent: words, className: isBad ? 'bad' : ''}),
    progress: share => share === null ? bar.remove() : bar.value = share,
  };
}

/** The content of a file, with its progress on the page and at the command. */
async function download(file, says) {
  const answer = await fetch(file.address);
  if (!answer.ok) throw new Refused(await answer.text());
  const content = new Uint8Array(file.bytes), reader = answer.body.getReader();
  let length = 0, shown = performance.now();
  for (let part; !(part = await reader.read()).done;) {
    content.set(part.value, length);
    length += part.value.length;
    const text = `fetching ${file.name}, ${(length / 1e6).toFixed(0)} of ${(file.bytes / 1e6).toFixed(0)} MB`;
    says(text);
    if (performance.now() - shown > 2000) {
      shown = performance.now();
      post('status', {text});
    }
  }
  return content;
}

/** The adapter for WebGPU, as text; null for WebAssembly. */
async function adapter(accelerator) {
  if (accelerator !== 'webgpu') return null;
  if (!navigator.gpu) throw new Refused('this browser has no WebGPU');
  const found = await navigator.gpu.requestAdapter();
  if (!found) throw new Refused('this browser finds no adapter for WebGPU');
  const {vendor, architecture, description} = found.info;
  return [vendor, architecture, description].filter(Boolean).join(' ') || 'an adapter without a name';
}

/** Milliseconds of a run, of `repeats` at once. */
async function timed(side, repeats) {
  const start = performance.now();
  for (let i = 0; i < repeats; i++) {
    for (let output of await side.model.run([side.input])) {
      if (side.onGpu) output = await output.moveTo('wasm'); // waits for the GPU
      output.delete();
    }
  }
  return (performance.now() - start) / repeats;
}

/** Every so many-th value of the outputs: `{name: [numbers]}`. */
async function outputsOf(side, every) {
  const found = {}, details = side.model.getOutputDetails();
  for (let [i, output] of (await side.model.run([side.input])).entries()) {
    if (side.onGpu) output = await output.moveTo('wasm');
    found[details[i].name] = [...output.toTypedArray()].filter((_, at) => at % every === 0);
    output.delete();
  }
  return found;
}

function shuffled(items) {
  for (let last = items.length - 1; last > 0; last--) {
    const other = Math.floor(Math.random() * (last + 1));
    [items[last], items[other]] = [items[other], items[last]];
  }
  return items;
}

/** Loads a file, or a second copy of it: a side of the comparison. */
async function prepared(content, task, input) {
  const start = performance.now(), onGpu = task.accelerator === 'webgpu';
  const model = await loadAndCompile(content, {
    accelerator: task.accelerator,
    cpuOptions: {numThreads: task.threads},
    ...(onGpu && {gpuOptions: {precision: 'fp32'}}), // float16 is not what the other devices compute
  });
  const tensor = new Tensor(input, task.shape);
  const side = {model, onGpu, init_ms: performance.now() - start, input: onGpu ? await tensor.moveTo('webgpu') : tensor};
  side.first_ms = await timed(side, 1);
  return side;
}

async function measure(task) {
  const part = card(task);
  part.progress(0);
  try {
    const found = await adapter(task.accelerator);
    if (task.threads > 1 && !crossOriginIsolated) throw new Refused('this browser gives one thread alone');
    show('Loading LiteRT.js');
    const runtime = await loadLiteRt('./wasm/', task.threads > 1 ? {threads: true} : undefined);
    try {
      await measureWith(runtime, task, part, found);
    } finally {
      unloadLiteRt(); // its memory only grows: the next pair begins with a new one
    }
  } catch (error) {
    const text = error instanceof Refused ? error.message : `the page has an error: ${error?.message ?? error}`;
    part.says(text, true);
    await post('failed', {task: task.number, text: text.slice(0, 300)});
  }
  part.progress(null);
}

async function measureWith(runtime, task, part, adapterName) {
  show('Fetching the files of the pair');
  const input = new Float32Array((await download(task.input, () => {})).buffer);
  const sides = {};
  for (const [side, file] of Object.entries(task.files)) {
    const content = await download(file, part.says);
    const text = `checking whether ${file.name} computes the same as on your computer`;
    show('Checking the outputs');
    part.says(text);
    await post('status', {text});
    await sleep(50); // the text appears
    sides[side] = await prepared(content, task, input);
    const {agrees, text: result} = await post('check', {task: task.number, side, outputs: await outputsOf(sides[side], file.every)});
    part.says(result, !agrees);
    if (!agrees) return;
    if (side === 'a') sides.control = await prepared(content, task, input);
  }
  for (let i = 0; i < WARMUP; i++) for (const side of Object.values(sides)) side.warm_ms = await timed(side, 1);
  const step = timerStep(), repeats = Math.max(1, Math.ceil(STEPS * step / Math.max(sides.a.warm_ms, step)));
  const {done, refused} = await post('ready', {
    task: task.number,
    init_ms: [sides.a.init_ms, sides.b.init_ms],
    first_ms: [sides.a.first_ms, sides.b.first_ms],
    is_delegated: [sides.a, sides.b].every(side => side.model.isFullyAccelerated),
    repeats,
    heap_bytes: runtime.liteRtWasm.HEAPU8.length,
    adapter: adapterName,
  });
  if (refused) part.says(refused, true);
  else await timeBlocks(sides, task, part, repeats, done);
  for (const side of Object.values(sides)) {
    side.input.delete();
    side.model.delete();
  }
}

async function timeBlocks(sides, task, part, repeats, done) {
  let more = true, left = '';
  while (more) {
    while (document.hidden) await sleep(500);
    wasHidden = false;
    show(`Timing: block ${done + 1} of ${task.blocks}${left}`);
    const start = performance.now();
    const times = {a: [], b: [], control: []};
    for (const side of shuffled(Object.keys(times).flatMap(name => Array(task.runs).fill(name)))) {
      times[side].push(await timed(sides[side], repeats));
    }
    if (wasHidden) continue; // the system may have slowed a page down that was not in front: once more
    const answer = await post('block', {task: task.number, number: done, times});
    ({more, done} = answer);
    part.says(answer.text);
    part.progress(done / task.blocks);
    left = `, ${((performance.now() - start) / 1000 * (task.blocks - done)).toFixed(0)} s left at most`;
  }
}

async function main() {
  const found = await facts();
  list(found);
  const limits = [];
  if (!isSecureContext) limits.push('This page came over plain HTTP, where a browser gives one thread and a coarse clock, and lets the screen go dark: touch it now and then. The option --https is for all of this.');
  else if (!await stayAwake()) limits.push('This browser may let the screen go dark: touch it now and then.');
  document.getElementById('limits').textContent = limits.join(' ');
  ({device} = await post('hello', {...found, device: Number(sessionStorage.getItem('device')) || null}));
  sessionStorage.setItem('device', device); // after a reload, the measurement continues
  for (;;) {
    const {what, text, task} = await post('next', {});
    if (what === 'measure') {
      await measure(task);
    } else {
      show(text, what === 'refused');
      if (what !== 'wait') break;
      await sleep(1000);
    }
  }
  device = null; // leaving this page is nothing to report now
  document.getElementById('advice').textContent = 'You can close this page.';
}

main().catch(error => show(error instanceof Refused ? error.message : `This page has an error: ${error?.message ?? error}`, true));
