import { verify, EMOJI } from "/tmp/demo-work/web/verify.js";
import assert from "node:assert";
class Ch extends EventTarget { sent=[]; send(t){ this.sent.push(t); const c=this.peer; const f=this.filter?this.filter(t):t; if(f!==null) setTimeout(()=>c.dispatchEvent(new MessageEvent("message",{data:f})),0);} }
const pair=()=>{const a=new Ch,b=new Ch;a.peer=b;b.peer=a;return[a,b]};
const fp=(n)=>Array.from({length:32},()=>n.toString(16).padStart(2,"0")).join(":");
const sdp=(n)=>({sdp:`v=0\r\na=fingerprint:SHA-256 ${fp(n).toUpperCase()}\r\nm=x\r\na=FINGERPRINT:sha-256 ${fp(n)}\r\n`});
const pc=(l,r)=>({localDescription:sdp(l),remoteDescription:sdp(r)});
const key=new Uint8Array(16).fill(7), key2=new Uint8Array(16).fill(8);
const run=(pa,ka,pb,kb,roles=["A","B"],patience=300)=>{const[a,b]=pair();return Promise.allSettled([verify({pc:pa,channel:a,role:roles[0],key:ka,patience}),verify({pc:pb,channel:b,role:roles[1],key:kb,patience})])};
const names=(r)=>r.map(x=>x.status==="fulfilled"?x.value.mode:x.reason.name);
let r=await run(pc(1,2),key,pc(2,1),key); assert.deepEqual(names(r),["key","key"]);
r=await run(pc(1,2),key,pc(2,1),null); assert.deepEqual(names(r),["compare","compare"]); assert.deepEqual(r[0].value.emoji,r[1].value.emoji); assert.equal(r[0].value.emoji.length,5); console.log(r[0].value.emoji.map(e=>e.symbol+e.name).join(" "));
r=await run(pc(1,2),null,pc(2,1),null); assert.deepEqual(names(r),["compare","compare"]);
r=await run(pc(1,2),null,pc(2,1),key); assert.deepEqual(names(r),["PeerNotAuthentic","PeerNotAuthentic"]);
r=await run(pc(1,2),key,pc(2,1),key2); assert.deepEqual(names(r),["PeerNotAuthentic","PeerNotAuthentic"]);
r=await run(pc(1,9),key,pc(2,9),key); assert.deepEqual(names(r),["PeerNotAuthentic","PeerNotAuthentic"]);
r=await run(pc(1,9),key,pc(2,9),null); assert.deepEqual(names(r),["compare","compare"]); assert.notDeepEqual(r[0].value.emoji,r[1].value.emoji);
r=await run(pc(1,2),key,pc(2,1),key,["A","A"]); assert.deepEqual(names(r),["VerifyFailed","VerifyFailed"]);
{const[a,b]=pair();const p=verify({pc:pc(1,2),channel:a,role:"A",patience:100}).catch(e=>e);assert.equal((await p).name,"VerifyFailed");}
{const[a,b]=pair();let n=0;a.filter=(t)=>{const m=JSON.parse(t);if(m.t==="nonce")m.nonce="00".repeat(32);return JSON.stringify(m)};
 const q=await Promise.allSettled([verify({pc:pc(1,2),channel:a,role:"A",patience:300}),verify({pc:pc(2,1),channel:b,role:"B",patience:300})]);assert.deepEqual(names(q),["compare","PeerNotAuthentic"]);}
{const[a,b]=pair();const p=verify({pc:pc(1,2),channel:a,role:"A",patience:300}).catch(e=>e);b.send("{nope");assert.equal((await p).name,"VerifyFailed");}
{const[a,b]=pair();const p=verify({pc:pc(1,2),channel:a,role:"A",patience:300}).catch(e=>e);b.send('{"t":"nonce"}');assert.equal((await p).name,"VerifyFailed");}
{const[a,b]=pair();const bad={localDescription:{sdp:sdp(1).sdp+`a=fingerprint:sha-256 ${fp(3)}\r\n`},remoteDescription:sdp(2)};const e=await verify({pc:bad,channel:a,role:"A"}).catch(e=>e);assert.equal(e.name,"PeerNotAuthentic");}
console.log("verify ok");
