"use strict";
// Gives back the lists that rmoe/results/packed.py packed; its docstring defines the format.
const TYPED = { uint8: Uint8Array, int8: Int8Array, uint16: Uint16Array, int16: Int16Array, uint32: Uint32Array,
  int32: Int32Array, float32: Float32Array, float64: Float64Array }; // little-endian, as every browser's machine is

async function numbers({ packed, bytes }) {
  const raw = Uint8Array.from(atob(bytes), (character) => character.charCodeAt(0));
  const stream = new Blob([raw]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new TYPED[packed](await new Response(stream).arrayBuffer());
}

const nulls = (array) => Array.from(array, (value) => (Number.isNaN(value) ? null : value));

async function leaves(node) {
  if (node.packed === "rows") {
    const names = Object.keys(node.columns), columns = [];
    for (const name of names) columns.push(await unpack(node.columns[name]));
    return columns[0].map((_, row) => Object.fromEntries(names.map((name, i) => [name, columns[i][row]])));
  }
  if (node.packed === "text") return (await unpack(node.at)).map((index) => node.of[index]);
  if (!node.of) return nulls(await numbers(node));
  const of = nulls(await numbers(node.of));
  return Array.from(await numbers(node), (index) => of[index]);
}

function grouped(flat, length) {
  const lists = [];
  if (typeof length === "number")
    for (let at = 0; at < flat.length; at += length) lists.push(flat.slice(at, at + length));
  else
    length.reduce((at, n) => (lists.push(flat.slice(at, at + n)), at + n), 0);
  return lists;
}

async function unpack(node) {
  if (node === null || typeof node !== "object") return node;
  if (Array.isArray(node)) {
    for (let i = 0; i < node.length; i++)
      if (node[i] !== null && typeof node[i] === "object") node[i] = await unpack(node[i]);
    return node;
  }
  if (!("packed" in node)) {
    for (const key of Object.keys(node)) node[key] = await unpack(node[key]);
    return node;
  }
  let found = await leaves(node);
  for (const length of [...(node.lengths || [])].reverse()) found = grouped(found, await unpack(length));
  return found;
}
