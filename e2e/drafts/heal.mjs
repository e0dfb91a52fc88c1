import { chromium } from "playwright-core"; import {spawn} from "node:child_process";
const up=()=>spawn("/tmp/demo-parley",{env:{...process.env,HOST:"127.0.0.1",PORT:"18555"},stdio:"ignore"});
let s=up();await new Promise(r=>setTimeout(r,800));
const base="http://127.0.0.1:18555";const browser=await chromium.launch({executablePath:"/usr/bin/chromium",args:["--no-sandbox","--disable-features=WebRtcHideLocalIpsWithMdns"]});
const mk=async()=>{const p=await(await browser.newContext()).newPage();p.on("pageerror",e=>console.log("PAGEERROR",e.message));return p};
const a=await mk(),b=await mk();await a.goto(base+"/?test");await a.click("#mint");await a.waitForSelector("#qr svg");await a.reload();await a.waitForSelector("#qr svg");console.log("reload keeps code",await a.textContent("#code"));
const link=await a.getAttribute("#link","href");await b.goto(link);await b.waitForSelector("#verified:not([hidden])");await a.waitForSelector("#verified:not([hidden])");
s.kill("SIGKILL");await a.waitForTimeout(1200);console.log("server dead:",await a.textContent("#status"));
await a.setInputFiles("#files",{name:"x.txt",mimeType:"text/plain",buffer:Buffer.from("hi")});await b.waitForSelector(".transfer[data-state=done]");console.log("sent meanwhile");
s=up();await a.waitForTimeout(5000);console.log("server back:",await a.textContent("#status"));
// ask-first offer (file picker present, >64 MiB)
await a.setInputFiles("#files",[]).catch(()=>{});
await a.evaluate(()=>{const f=new File([new Uint8Array(70e6)],"huge.iso");window.parleyDemo.transfer.send([f])});
await b.waitForSelector(".transfer[data-state=offered]");
await b.evaluate(()=>{window.__n=0;window.showSaveFilePicker=async()=>({createWritable:async()=>({write:async c=>{window.__n+=c.byteLength},close:async()=>{window.__c=1},abort:async()=>{}})})});
await b.screenshot({path:"offer.png"});await b.click('.transfer[data-state=offered] button:has-text("Save")');
await b.waitForSelector('.transfer[data-state=done]:has-text("huge.iso")',{timeout:40000});console.log("disk",await b.evaluate(()=>[window.__n,window.__c]),await b.textContent('.transfer:has-text("huge.iso") .t-note'));
// someone with the session but a wrong key
const c=await mk();const st=JSON.parse(await b.evaluate(()=>sessionStorage.getItem("parley-demo")));await b.close();
st.key="AAAAAAAAAAAAAAAAAAAAAA";await c.goto(base+"/web/parley.d.ts");await c.evaluate(v=>sessionStorage.setItem("parley-demo",v),JSON.stringify(st));await c.goto(base+"/");
await a.waitForSelector("#screen-warning:not([hidden])",{timeout:15000});console.log("wrong key:",await a.textContent("#warning-title"));
await a.click("#start-over");s.kill();await a.waitForTimeout(300);await a.click("#mint");await a.waitForSelector("#error:not([hidden])");console.log("down:",await a.textContent("#error"));
await browser.close();
