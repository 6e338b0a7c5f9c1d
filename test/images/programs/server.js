// A server with state of several kinds in one process of Node.js: objects on the heap, a timer, a worker thread, a promise that
// is not settled, and compiled code that is called all the time.
'use strict';

const crypto = require('crypto');
const http = require('http');
const { Worker } = require('worker_threads');

const heap = new Map();
let ticks = 0;
setInterval(() => { ticks++; }, 10);

let settled = 'pending';
let settle;
new Promise((resolve) => { settle = resolve; }).then(() => { settled = 'settled'; });

const worker = new Worker(`
  const { parentPort } = require('worker_threads');
  let sum = 0;
  parentPort.on('message', (n) => { sum += n; parentPort.postMessage(sum); });
`, { eval: true });
const askWorker = (n) => new Promise((resolve) => { worker.once('message', resolve); worker.postMessage(n); });

const answers = {
  '/fill': async () => {
    for (let i = 0; i < 10000; i++) heap.set(`key ${i}`, { i, random: Math.random() });
    await askWorker(42);
    return 'filled';
  },
  '/ticks': async () => String(ticks),
  '/state': async () => {
    const sum = crypto.createHash('sha256');
    for (const [key, value] of heap) sum.update(key + JSON.stringify(value));
    return `${heap.size} objects ${sum.digest('hex')}, worker ${await askWorker(0)}, promise ${settled}`;
  },
};

http.createServer(async (request, response) => {
  const answer = answers[request.url];
  response.statusCode = answer ? 200 : 404;
  response.end(answer ? await answer() : '');
}).listen(8080, '127.0.0.1').keepAliveTimeout = 0;

process.on('SIGTERM', () => { settle(); process.exit(0); });
