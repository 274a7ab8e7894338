import java.io.DataInputStream;
import java.io.DataOutputStream;
import java.io.EOFException;
import java.io.IOException;
import java.net.ServerSocket;
import java.net.Socket;
import java.net.SocketTimeoutException;
import java.util.Arrays;
import java.util.Random;
import java.util.concurrent.Callable;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;
import java.util.ArrayList;
import java.util.List;

/** Blocking sockets, a thread for each connection and direction. `serve PORT`, or `ask HOST PORT CONNECTIONS ROUNDS`. */
public final class Threads {
    private static final int PATIENCE = 20_000;
    private static final int BULK = 4 << 20;

    public static void main(String[] arguments) throws Exception {
        if (arguments[0].equals("serve")) {
            serve(Integer.parseInt(arguments[1]));
        } else {
            ask(arguments[1], Integer.parseInt(arguments[2]), Integer.parseInt(arguments[3]), Integer.parseInt(arguments[4]));
        }
    }

    private static void serve(int port) throws IOException {
        try (ServerSocket listener = new ServerSocket(port, 128)) {
            while (true) {
                Socket socket = listener.accept();
                new Thread(() -> answer(socket)).start();
            }
        }
    }

    /** Echoes messages, each with its length before it; then all that comes until the end. */
    private static void answer(Socket socket) {
        try (socket) {
            socket.setTcpNoDelay(true);
            DataInputStream in = new DataInputStream(socket.getInputStream());
            DataOutputStream out = new DataOutputStream(socket.getOutputStream());
            for (int length = in.readInt(); length > 0; length = in.readInt()) {
                byte[] message = in.readNBytes(length);
                out.writeInt(message.length);
                out.write(message);
            }
            in.transferTo(out);
            socket.shutdownOutput();
        } catch (IOException error) {
            System.err.println(error);
        }
    }

    private static void ask(String host, int port, int connections, int rounds) throws Exception {
        ExecutorService threads = Executors.newCachedThreadPool();
        List<Future<String>> said = new ArrayList<>();
        for (int at = 0; at < connections; at++) {
            int seed = at;
            said.add(threads.submit(() -> exchange(threads, host, port, seed, rounds)));
        }
        for (int at = 0; at < connections; at++) {
            System.out.println(at + " " + said.get(at).get());
        }
        threads.shutdown();
    }

    private static String exchange(ExecutorService threads, String host, int port, int seed, int rounds) {
        Random random = new Random(seed);
        try (Socket socket = new Socket(host, port)) {
            socket.setTcpNoDelay(true);
            DataInputStream in = new DataInputStream(socket.getInputStream());
            DataOutputStream out = new DataOutputStream(socket.getOutputStream());
            socket.setSoTimeout(50);
            String silence = "something came";
            try {
                in.read();
            } catch (SocketTimeoutException nothing) {
                silence = "nothing came";
            }
            socket.setSoTimeout(PATIENCE);
            for (int round = 0; round < rounds; round++) {
                byte[] message = new byte[1 + random.nextInt(round % 10 == 0 ? 100_000 : 100)];
                random.nextBytes(message);
                out.writeInt(message.length);
                out.write(message);
                if (!Arrays.equals(in.readNBytes(in.readInt()), message)) {
                    return "another message came back in round " + round;
                }
            }
            out.writeInt(0);
            byte[] bulk = new byte[BULK];
            random.nextBytes(bulk);
            Callable<Integer> send = () -> {
                out.write(bulk);
                socket.shutdownOutput();
                return bulk.length;
            };
            Future<Integer> sent = threads.submit(send);
            byte[] back = in.readAllBytes();
            return silence + ", " + rounds + " rounds, " + sent.get() + " bytes there, " + back.length + " back, the same: "
                + Arrays.equals(bulk, back);
        } catch (EOFException error) {
            return "the end came early";
        } catch (Exception error) {
            return error.toString();
        }
    }
}
